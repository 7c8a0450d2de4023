// The report in Chromium: no errors, no requests, hover and keys, filters, brushing, hostile text.
// Oracle: what a person would see, read from the page after what a person would do.
import assert from "node:assert/strict";
import { mkdirSync } from "node:fs";
import path from "node:path";
import { after, before, test } from "node:test";
import { EXECUTABLE, SHOTS, launch, makePages, open } from "./browser.mjs";

const skip = EXECUTABLE ? false : "no Chromium on this machine (set CHROMIUM to its path)";
let browser;
let pages;

before(async () => {
  if (skip) return;
  mkdirSync(SHOTS, { recursive: true });
  pages = makePages("small", "hostile");
  browser = await launch();
});
after(async () => {
  await browser?.close();
  pages?.remove();
});

async function onSmall(options, act) {
  const opened = await open(browser, pages.url("small"), options);
  await act(opened.page, opened);
  assert.deepEqual(opened.errors, []);
  await opened.close();
}

const why = (page) => page.locator("#details .why").textContent();
const span = (page, at) => page.locator("#sides .side:first-child .text span").nth(at);

test("loads without errors and asks for nothing but itself", { skip }, () =>
  onSmall({}, async (page, { requests }) => {
    assert.deepEqual(requests, [pages.url("small")]);
    for (const id of ["settings", "outcome", "budget", "tokens", "selected", "training", "speed"]) {
      assert.equal(await page.locator(`section#${id}`).count(), 1, id);
    }
    assert.equal(await page.locator("section#diagnostic").count(), 0);
  }));

test("the policy stops a script and a picture that somebody adds", { skip }, async () => {
  const { page, errors, close } = await open(browser, pages.url("small"));
  await page.evaluate(() => {
    const script = document.createElement("script");
    script.textContent = "window.harmed = 1";
    const image = new Image();
    image.src = "http://127.0.0.1:9/x.png";
    document.body.append(script, image);
  });
  await page.waitForTimeout(100);
  assert.equal(await page.evaluate(() => window.harmed), undefined);
  assert.equal(errors.filter((text) => text.includes("Content Security Policy")).length, 2, errors.join());
  await close();
});

test("hover shows rank, cut and both lists", { skip }, () =>
  onSmall({}, async (page) => {
    await span(page, 7).hover();
    assert.match(await why(page), /^(not )?kept: rank [\d,]+ of [\d,]+; cut at \d+/);
    assert.equal(await page.locator("#details .tops h5").count(), 2);
    assert.ok((await page.locator("#details .tops li").count()) >= 2);
    assert.equal(await page.locator("#details .tops li.sampled").count() >= 1, true);
    const shown = await page.locator("#details h4").textContent();
    const word = await span(page, 7).textContent();
    assert.equal(shown.replace("␣", " ").trim(), word.trim());
  }));

test("opens on the rollout that the first selection taught most", { skip }, () =>
  onSmall({}, async (page) => {
    const seen = await page.$$eval("#list button", (all) =>
      all.map(({ rollout, ariaCurrent }) => ({ run: rollout.run, taught: rollout.kept * rollout.n, shown: ariaCurrent === "true" })),
    );
    const first = seen.filter((one) => one.run === seen[0].run);
    const [shown] = seen.filter((one) => one.shown);
    assert.equal(shown.run, seen[0].run);
    assert.equal(shown.taught, Math.max(...first.map((one) => one.taught)));
  }));

test("keys walk through tokens, lines and kept tokens; one tab stop", { skip }, () =>
  onSmall({}, async (page) => {
    await span(page, 0).focus();
    const at = () => page.evaluate(() => document.activeElement.at);
    await page.keyboard.press("ArrowRight");
    assert.equal(await at(), 1);
    await page.keyboard.press("ArrowLeft");
    assert.equal(await at(), 0);
    await page.keyboard.press("ArrowDown");
    assert.ok((await at()) > 1);
    await page.keyboard.press("Home");
    await page.keyboard.press("n");
    assert.match(await why(page), /^kept/);
    await page.keyboard.press("End");
    assert.equal(await at(), (await page.locator("#sides .side:first-child .text span").count()) - 1);
    assert.equal(await page.locator('#sides .text span[tabindex="0"]').count(), 1);
  }));

test("everything can be reached by Tab, with a visible outline", { skip }, () =>
  onSmall({}, async (page) => {
    await page.locator("#signal").focus();
    const seen = new Set();
    for (let i = 0; i < 60; i += 1) {
      await page.keyboard.press("Tab");
      const state = await page.evaluate(() => {
        const element = document.activeElement;
        const style = getComputedStyle(element);
        return { id: element.id || element.className || element.tagName, outline: style.outlineStyle };
      });
      if (state.id !== "BODY") assert.notEqual(state.outline, "none", state.id);
      seen.add(state.id);
    }
    for (const id of ["run", "order", "search", "wrong", "truncated", "range-d0", "clear"]) {
      assert.ok([...seen].includes(id), id);
    }
  }));

test("filters and order change the list", { skip }, () =>
  onSmall({}, async (page) => {
    const count = () => page.locator("#list button").count();
    const all = await count();
    assert.equal(all, 11);
    await page.locator("#truncated").check();
    assert.equal(await count(), 3);
    await page.locator("#truncated").uncheck();
    await page.selectOption("#run", "b");
    assert.equal(await count(), 3);
    await page.selectOption("#run", "");
    await page.fill("#search", "Question 4");
    assert.equal(await count(), 1);
    await page.fill("#search", "");
    await page.locator("#wrong").check();
    assert.equal(await count(), all);
    await page.locator("#wrong").uncheck();
    await page.selectOption("#order", "disagreement");
    const values = await page.$$eval("#list button", (all) => all.map((one) => one.rollout.meanD));
    assert.deepEqual(values, [...values].sort((a, b) => b - a));
    await page.locator("#list button").nth(2).click();
    assert.equal(await page.locator('#list button[aria-current="true"]').count(), 1);
  }));

test("shading and legend follow the signal", { skip }, () =>
  onSmall({}, async (page) => {
    const classes = () => page.$$eval("#sides .text span", (all) => all.map((one) => one.className).join());
    const shades = new Set();
    for (const signal of ["disagreement", "compatibility", "entropy", "learnable", "incompatible", "kept"]) {
      await page.selectOption("#signal", signal);
      shades.add(await classes());
      assert.ok((await page.locator("#legend li").count()) >= 2, signal);
    }
    assert.equal(shades.size, 6);
  }));

test("brushing by pointer and by numbers marks tokens in the text", { skip }, () =>
  onSmall({}, async (page) => {
    const canvas = page.locator("#scatter");
    await canvas.scrollIntoViewIfNeeded();
    const box = await canvas.boundingBox();
    await page.mouse.move(box.x + 60, box.y + 15);
    await page.mouse.down();
    await page.mouse.move(box.x + box.width - 5, box.y + box.height - 40, { steps: 4 });
    await page.mouse.up();
    const inside = await page.locator("#sides .text span.in").count();
    assert.ok(inside > 0);
    assert.equal(await page.locator("#sides .text.brushing").count(), 1);
    assert.match(await page.locator("#brushed").textContent(), new RegExp(`^${inside} of `));
    await page.locator("#clear").click();
    assert.equal(await page.locator("#sides .text.brushing").count(), 0);
    await page.fill("#range-d0", "0.2");
    const expected = await page.evaluate(() => document.querySelectorAll("#sides .text span.in").length);
    assert.ok(expected > 0 && expected < (await page.locator("#sides .text span").count()));
  }));

test("two selectors side by side on the same rollout, pointed at together", { skip }, () =>
  onSmall({}, async (page) => {
    await page.locator("#list button").first().click();
    const options = await page.locator("#beside option").allTextContents();
    assert.ok(options.some((text) => text.startsWith("same completion: b")), options.join());
    await page.selectOption("#beside", { index: 1 });
    assert.equal(await page.locator("#sides .text").count(), 2);
    await span(page, 3).hover();
    assert.equal(await page.locator("#sides span.at").count(), 2);
  }));

for (const width of [360, 400, 1280, 2560]) {
  for (const colorScheme of ["light", "dark"]) {
    test(`no sideways scrolling at ${width} px, ${colorScheme}`, { skip }, () =>
      onSmall({ viewport: { width, height: 900 }, colorScheme }, async (page) => {
        const wide = await page.evaluate(() => document.documentElement.scrollWidth);
        assert.ok(wide <= width, `${wide}`);
        await span(page, 3).hover();
        await page.screenshot({ path: path.join(SHOTS, `small-${width}-${colorScheme}.png`), fullPage: true });
      }));
  }
}

for (const width of [400, 1280, 2560]) {
  test(`labels of a chart neither touch nor leave the page, and can be read, at ${width} px`, { skip }, () =>
    onSmall({ viewport: { width, height: 900 } }, async (page) => {
      const found = await page.evaluate(() => {
        const bad = [];
        let least = Infinity;
        for (const svg of document.querySelectorAll("main svg")) {
          const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
          for (const [index, [words, box]] of texts.entries()) {
            least = Math.min(least, box.height);
            if (box.right > innerWidth || box.left < 0) bad.push(`outside: ${words}`);
            for (const [others, other] of texts.slice(index + 1)) {
              const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
              const down = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
              if (across > 0 && down > 0.3 * box.height) bad.push(`${words} on ${others}`);
            }
          }
        }
        return { bad, least };
      });
      assert.deepEqual(found.bad, []);
      // The height of a line: letters of 9, 12 and 15 pixels.
      assert.ok(found.least >= { 400: 10, 1280: 13, 2560: 17 }[width], `${found.least}`);
    }));
}

test("an arm has one color in curves and bars", { skip }, () =>
  onSmall({}, async (page) => {
    const arms = await page.evaluate(() => {
      const color = (element, name) => getComputedStyle(element)[name];
      const key = [...document.querySelectorAll("#training .key li")].slice(0, 2);
      const bars = [...document.querySelectorAll("#selected h3")].map((head) => [
        head.textContent.split(":")[0],
        [...head.nextElementSibling.nextElementSibling.querySelectorAll("rect")].map((bar) => color(bar, "fill")),
      ]);
      return { key: key.map((item) => [item.textContent, color(item.querySelector("line"), "stroke")]), bars };
    });
    assert.equal(arms.bars.length, 2);
    for (const [name, fills] of arms.bars) {
      const [, own] = arms.key.find(([label]) => label === name);
      assert.deepEqual([...new Set(fills)], [own], name);
    }
    assert.notEqual(arms.key[0][1], arms.key[1][1]);
  }));

for (const colorScheme of ["light", "dark"]) {
  test(`text and its ground differ by 4.5 to 1 or more, ${colorScheme}`, { skip }, () =>
    onSmall({ colorScheme }, async (page) => {
      const low = await page.evaluate(() => {
        const channel = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const parse = (text) => text.match(/[\d.]+/g).map(Number);
        const light = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
        const ground = (element) => {
          for (let at = element; at; at = at.parentElement) {
            const color = parse(getComputedStyle(at).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
          }
          return [255, 255, 255];
        };
        const bad = [];
        const check = (element, color) => {
          const [a, b] = [light(color), light(ground(element))];
          const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (ratio < 4.5) bad.push(`${element.tagName}.${element.className.baseVal ?? element.className} ${ratio.toFixed(2)}`);
        };
        for (const element of document.querySelectorAll("body *")) {
          const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
          if (!own || !element.getClientRects().length || ["SCRIPT", "TITLE"].includes(element.tagName)) continue;
          const style = getComputedStyle(element);
          check(element, parse(element.ownerSVGElement ? style.fill : style.color));
        }
        // Every shade with the text that may stand on it.
        const text = document.querySelector("#sides .text");
        for (const level of "1234567") {
          for (const ramp of "so") {
            const probe = document.createElement("span");
            probe.className = ramp + level;
            text.append(probe);
            check(probe, parse(getComputedStyle(probe).color));
            probe.remove();
          }
        }
        return [...new Set(bad)];
      });
      assert.deepEqual(low, []);
    }));
}

test("without JavaScript all that is static is there", { skip }, async () => {
  const { page, close } = await open(browser, pages.url("small"), { javaScriptEnabled: false });
  assert.equal(await page.locator("section#outcome svg").count() > 0, true);
  assert.equal(await page.locator("section#training svg").count() > 5, true);
  assert.equal(await page.locator(".nojs mark").count() > 0, true);
  assert.equal(await page.locator(".inspector").isVisible(), false);
  await close();
});

test("hostile text does no harm and can be read", { skip }, async () => {
  const { page, errors, requests, close } = await open(browser, pages.url("hostile"));
  const list = page.locator("#list button");
  assert.equal(await list.count(), 2);
  for (let i = 0; i < 2; i += 1) {
    await list.nth(i).click();
    for (let at = 0; at < 18; at += 1) await span(page, at).hover();
  }
  assert.ok((await page.locator("#sides .text span").count()) >= 3000);
  await page.getByRole("button", { name: /show the next/ }).click();
  assert.ok((await page.locator("#sides .text span").count()) >= 6000);
  await list.nth(0).click();
  const text = await page.locator("#sides .text").textContent();
  for (const shown of ["⟨U+202E⟩", "⟨U+2067⟩", "␀", "␛", "<script>", "שלום", "⟨U+200D⟩", "⟨U+D800⟩"]) {
    assert.ok(text.includes(shown), shown);
  }
  assert.ok(!/[\u202a-\u202e\u2066-\u2069\u0000-\u0008]/.test(await page.content()));
  assert.equal(await page.evaluate(() => window.harmed), undefined);
  assert.equal(await page.locator("#sides img, #sides script, #sides b, #details img").count(), 0);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(wide <= 1280, `${wide}`);
  await page.screenshot({ path: path.join(SHOTS, "hostile.png"), fullPage: true });
  assert.deepEqual(errors, []);
  assert.equal(requests.length, 1);
  await close();
});
