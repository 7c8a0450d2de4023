// One headless Chromium for the tests, pages that record every console error, and the commands that
// make the pages under test. PYTHON names the interpreter that has taopd.
import { execFileSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

export const HERE = path.dirname(fileURLToPath(import.meta.url));
const CANDIDATES = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
export const EXECUTABLE = CANDIDATES.find((name) => name && existsSync(name));
export const SHOTS = process.env.SHOTS || path.join(HERE, "shots");
const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];

export async function launch() {
  return chromium.launch({ executablePath: EXECUTABLE, headless: true, args: FLAGS });
}

// Runs make_pages.py once; returns the folder with the pages, and how to remove it.
export function makePages(...names) {
  const folder = mkdtempSync(path.join(tmpdir(), "taopd-pages-"));
  const python = process.env.PYTHON || "python3";
  execFileSync(python, [path.join(HERE, "make_pages.py"), folder, ...names], { stdio: ["ignore", "ignore", "inherit"] });
  return {
    url: (name) => pathToFileURL(path.join(folder, `${name}.html`)).href,
    folder,
    remove: () => rmSync(folder, { recursive: true, force: true }),
  };
}

// A page that is ready for a person, with the errors it had on the way and every request it made.
export async function open(browser, url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  const errors = [];
  const requests = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) errors.push(message.text());
  });
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("request", (request) => requests.push(request.url()));
  page.on("dialog", (dialog) => {
    errors.push(`dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  await page.goto(url);
  if (options.javaScriptEnabled !== false) {
    await page.waitForFunction(() => !document.getElementById("rollouts") || document.documentElement.dataset.ready);
  }
  return { page, errors, requests, close: () => context.close() };
}
