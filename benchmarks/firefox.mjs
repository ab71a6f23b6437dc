// Tries the browser page in Firefox. Playwright can only drive its own build of Firefox, so this uses puppeteer:
//
//   apt-get install firefox-esr xvfb; npm install --no-save --ignore-scripts puppeteer-core@24.43.1
//   python deployment/serve_browser.py &
//   xvfb-run -s "-screen 0 1400x900x24" node benchmarks/firefox.mjs http://127.0.0.1:8600 firefox.png
//
// It opens a sample and prints the figures that the page shows, in one plane and in three; the picture goes to the
// file. Headless Firefox has no WebGL on a machine without a graphics card, so it gets a virtual screen (Xvfb).

import puppeteer from "puppeteer-core";

const [address, picture] = process.argv.slice(2);
const browser = await puppeteer.launch({ browser: "firefox", executablePath: process.env.FIREFOX ?? "/usr/bin/firefox-esr", headless: false,
  extraPrefsFirefox: { "webgl.force-enabled": true } });
const page = await browser.newPage(), failures = [];
page.on("pageerror", ({ message }) => failures.push(message));
const text = (id) => page.evaluate((of) => document.getElementById(of).innerText, id);

/** Waits until an element's text matches; puppeteer's own waiting stops in a window that is covered. */
async function until(id, pattern) {
  for (let k = 0; k < 300; k++) {
    const found = await text(id);
    if (pattern.test(found)) return found;
    if (await text("messages")) break;
    await new Promise((done) => setTimeout(done, 1000));
  }
  throw new Error(`${id} says ${await text(id)}; ${await text("messages")}`);
}

/** Opens a sample and returns what the page says about it. Tries again if the sample did not appear. */
async function open(number) {
  for (let again = 0; again < 3; again++) {
    await page.evaluate((k) => document.querySelectorAll("#samples button")[k].click(), number);
    await until("figures", /Tumour/).then(() => (again = 3), (error) => console.log("again:", error.message));
  }
  return `${await until("status", /slices in/)} ${(await text("figures")).replaceAll("\n", "; ").replaceAll("\t", " ")}`;
}

await page.setViewport({ width: 1280, height: 800 });
await page.goto(address);
console.log(await browser.version(), await until("status", /Ready/), await text("version"));
console.log(await open(0));
const planes = "#viewer .bar button:nth-of-type(2)";
await page.evaluate((of) => document.querySelector(of).click(), planes);
console.log("three planes:", await page.evaluate(() => document.getElementById("viewer").viewer.look.plane));
if (picture) await page.screenshot({ path: picture });
await page.evaluate(() => document.getElementById("close").click());
console.log("kept for the next visit:", await page.evaluate(() => document.body.dataset.kept ?? "no"));
console.log("graphics card by WebGPU:", await page.evaluate(() => Boolean(navigator.gpu)));
console.log("errors:", failures.length ? failures : "none");
await browser.close();
