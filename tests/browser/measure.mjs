// Time to first paint, to a ready inspector, per hover and per scrolled frame, on the large page.
// Prints one JSON line; docs/report.md holds the numbers. Interactions are real mouse events; their
// durations are the browser's own (Event Timing: input to the next paint, in steps of 8 ms).
import { statSync } from "node:fs";
import path from "node:path";
import { launch, makePages } from "./browser.mjs";

const pages = makePages("large");
const browser = await launch();
const runs = [];
for (let repeat = 0; repeat < 5; repeat += 1) {
  const page = await (await browser.newContext({ viewport: { width: 1280, height: 900 } })).newPage();
  await page.addInitScript(() => {
    window.events = [];
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) window.events.push([entry.name, entry.duration, entry.processingEnd - entry.processingStart]);
    }).observe({ type: "event", durationThreshold: 16, buffered: true });
  });
  const started = Date.now();
  await page.goto(pages.url("large"));
  await page.waitForFunction(() => document.documentElement.dataset.ready);
  const ready = Date.now() - started;
  const paint = await page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0].startTime);
  await page.locator("#sides").scrollIntoViewIfNeeded();
  const box = await page.locator("#sides .text").boundingBox();
  await page.evaluate(() => { window.events.length = 0; });
  for (let i = 0; i < 60; i += 1) {
    await page.mouse.move(box.x + 20 + ((i * 53) % (box.width - 40)), box.y + 12 + ((i * 29) % 400));
  }
  await page.waitForTimeout(200);
  const hovers = await page.evaluate(() => window.events.filter(([name]) => name.startsWith("pointer") || name.startsWith("mouse")));
  const work = await page.evaluate(() => {
    const spans = [...document.querySelectorAll("#sides .text span")];
    const times = [];
    for (let i = 0; i < 300; i += 1) {
      const span = spans[(i * 37) % spans.length];
      const from = performance.now();
      span.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
      document.body.getBoundingClientRect();
      times.push(performance.now() - from);
    }
    times.sort((a, b) => a - b);
    return { median: times[150], p99: times[296] };
  });
  await page.evaluate(() => {
    window.gaps = [];
    let last = performance.now();
    const tick = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
  });
  for (let i = 0; i < 40; i += 1) await page.mouse.wheel(0, i % 2 ? 120 : 240);
  await page.waitForTimeout(300);
  const gaps = (await page.evaluate(() => window.gaps)).sort((a, b) => a - b);
  const slow = hovers.map(([, duration]) => duration).sort((a, b) => a - b);
  const choose = await page.evaluate(async () => {
    const buttons = [...document.querySelectorAll("#list button")];
    const times = [];
    for (const button of buttons.slice(0, 30)) {
      const from = performance.now();
      button.click();
      document.body.getBoundingClientRect();
      times.push(performance.now() - from);
    }
    return times.sort((a, b) => a - b)[15];
  });
  runs.push({
    first_paint_ms: paint,
    ready_ms: ready,
    hover_script_median_ms: work.median,
    hover_script_p99_ms: work.p99,
    slowest_hover_to_paint_ms: slow.at(-1) ?? 16,
    scroll_frame_p95_ms: gaps[Math.floor(0.95 * gaps.length)],
    choose_rollout_median_ms: choose,
  });
  await page.context().close();
}
const median = (name) => runs.map((run) => run[name]).sort((a, b) => a - b)[2];
const summary = Object.fromEntries(Object.keys(runs[0]).map((name) => [name, Math.round(10 * median(name)) / 10]));
summary.megabytes = statSync(path.join(pages.folder, "large.html")).size / 1e6;
console.log(JSON.stringify(summary));
await browser.close();
pages.remove();
