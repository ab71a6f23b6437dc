// What makes the page work without a network: see offline.js.

/** Keep the page's own files, the model too, so that the next visit needs no network. */
export async function keep(files) {
  if (!navigator.serviceWorker) return;
  await navigator.serviceWorker.register("offline.js");
  await navigator.serviceWorker.ready;
  const cache = await caches.open("medfl-page");
  const own = performance.getEntriesByType("resource").map(({ name }) => name).filter((name) => name.startsWith(location.origin + "/"));
  const before = await cache.keys();
  const wanted = new Set([location.href.split("#")[0], new URL("index.html", location).href, ...["icon.svg", ...files].map((name) => new URL(name, location).href), ...own]);
  await Promise.all([...wanted].map(async (name) => {
    const answer = await fetch(name);
    if (answer.ok) await cache.put(name, answer);
  }));
  await Promise.all(before.filter(({ url }) => !wanted.has(url)).map((request) => cache.delete(request)));
  document.body.dataset.kept = "yes";
}
