// A service worker: the page's own files from the network, and without one those that were kept at the last visit. Scans are no files of
// the page, and nothing of them comes by here.

const KEPT = "medfl-page";

addEventListener("install", () => skipWaiting()); // it begins with the next visit: Firefox fails requests of a page that is claimed meanwhile
addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || new URL(request.url).origin !== location.origin) return;
  event.respondWith(fetch(request).catch(async (error) => {
    const kept = await (await caches.open(KEPT)).match(request, { ignoreSearch: true });
    if (!kept) throw error;
    return kept;
  }));
});
