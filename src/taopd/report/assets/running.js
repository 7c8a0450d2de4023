// A rollout as running text: one span per token, one tab stop, arrows move between tokens.
T.CHUNK = 3000; // Tokens put on the page at once; a button shows the next ones.

T.side = function (rollout, place) {
  const side = T.element("div", "side");
  side.append(T.element("h4", "", T.title(rollout)));
  const facts = [`${T.whole(rollout.n)} tokens`];
  if (rollout.kept !== null) facts.push(`${T.share(rollout.kept, 1)} kept`);
  if (rollout.teacher) facts.push(`teacher ${rollout.teacher}`);
  if (rollout.answer !== null) facts.push(`answer ${rollout.answer}`);
  if (rollout.correct !== null) facts.push(rollout.correct ? "right" : "wrong");
  if (rollout.truncated) facts.push("truncated");
  side.append(T.element("div", "note", facts.join(" · ")));
  const prompts = [["prompt", rollout.prompt]];
  if (rollout.teacherPrompt) {
    prompts.push(["prompt of the teacher", `The teacher reads: ${rollout.teacherPrompt}`]);
  }
  for (const [label, words] of prompts) {
    const prompt = T.element("div", "prompt", words);
    prompt.tabIndex = 0;
    prompt.setAttribute("role", "region");
    prompt.setAttribute("aria-label", label);
    side.append(prompt);
  }
  // What the chat template adds to every prompt stays in reach, out of the way.
  const [before, after] = rollout.around;
  if (before || after) {
    const template = T.element("details", "template");
    template.append(T.element("summary", "", "chat template"), T.element("div", "prompt", `${before}…${after}`));
    side.append(template);
  }
  const text = T.element("div", "text");
  text.setAttribute("role", "listbox");
  text.setAttribute("aria-label", `completion ${place + 1}, one option per token`);
  text.rollout = rollout;
  side.append(text);
  T.extend(text, 0);
  return side;
};

T.title = (rollout) => rollout.label || `${rollout.run}, step ${rollout.step}`;

T.extend = function (text, from) {
  const { rollout } = text;
  const to = Math.min(rollout.n, from + T.CHUNK);
  const spans = document.createDocumentFragment();
  for (let i = from; i < to; i += 1) {
    const token = rollout.start + i;
    const span = T.element("span", T.classes(token), T.word(token));
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.tabIndex = i === 0 ? 0 : -1;
    span.at = i;
    // An attribute, not an element: the token at place i is the child at place i.
    const told = (place) => rollout.toolResults.filter(([after]) => after === place).map(([, result]) => result).join("");
    if (told(i)) span.dataset.before = told(i);
    if (i === rollout.n - 1 && told(rollout.n)) span.dataset.after = told(rollout.n);
    spans.append(span);
  }
  if (text.more) text.more.remove();
  text.append(spans);
  if (to < rollout.n) {
    text.more = T.element("button", "more", `show the next ${T.whole(Math.min(T.CHUNK, rollout.n - to))} tokens`);
    text.more.addEventListener("click", () => T.extend(text, to));
    text.after(text.more);
  }
};

T.classes = function (token) {
  const names = [T.shade(T.state.signal, token)];
  if (T.kept(token)) names.push("kept");
  else if (T.anchored(token)) names.push("anchored");
  if (T.state.brush && T.inBrush(token)) names.push("in");
  return names.filter(Boolean).join(" ");
};

T.texts = () => [...document.querySelectorAll("#sides .text")];

T.reshade = function () {
  for (const text of T.texts()) {
    text.classList.toggle("brushing", Boolean(T.state.brush));
    for (const span of text.children) {
      const names = T.classes(text.rollout.start + span.at);
      if (span.className !== names) span.className = names;
    }
  }
  T.point(T.state.text, T.state.at);
};

// Show a token: its details, and the same place in the text beside it.
T.point = function (text, at) {
  if (!text || !text.isConnected) return;
  for (const old of document.querySelectorAll("#sides .at")) {
    old.classList.remove("at");
    old.setAttribute("aria-selected", "false");
  }
  T.state.text = text;
  T.state.at = at;
  for (const each of T.texts()) {
    const span = each.children[at];
    if (span && (each === text || each.rollout.pair === text.rollout.pair)) span.classList.add("at");
  }
  if (text.children[at]) text.children[at].setAttribute("aria-selected", "true");
  T.details(text.rollout, text.rollout.start + at);
  T.ring(text.rollout.start + at);
};

T.listen = function (sides) {
  const spanOf = (event) => (event.target.at === undefined ? null : event.target);
  sides.addEventListener("pointerover", (event) => {
    const span = spanOf(event);
    if (span) T.point(span.parentNode, span.at);
  });
  sides.addEventListener("focusin", (event) => {
    const span = spanOf(event);
    if (span) T.point(span.parentNode, span.at);
  });
  sides.addEventListener("click", (event) => spanOf(event)?.focus({ preventScroll: true }));
  sides.addEventListener("keydown", (event) => {
    const span = spanOf(event);
    if (!span) return;
    const text = span.parentNode;
    const next = T.move(event, text, span);
    if (next === null) return;
    event.preventDefault();
    const target = text.children[Math.max(0, Math.min(text.children.length - 1, next))];
    span.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
  });
};

// Arrows go by token and line, "n" and "p" to the next and the previous kept token.
T.move = function (event, text, span) {
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  if (event.key === "ArrowRight") return span.at + 1;
  if (event.key === "ArrowLeft") return span.at - 1;
  if (event.key === "Home") return 0;
  if (event.key === "End") return text.children.length - 1;
  if (event.key === "n" || event.key === "p") {
    const step = event.key === "n" ? 1 : -1;
    for (let i = span.at + step; i >= 0 && i < text.children.length; i += step) {
      if (T.kept(text.rollout.start + i)) return i;
    }
    return span.at;
  }
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return null;
  const box = span.getBoundingClientRect();
  const step = event.key === "ArrowDown" ? 1 : -1;
  let best = null;
  for (let i = span.at + step; i >= 0 && i < text.children.length; i += step) {
    const other = text.children[i].getBoundingClientRect();
    const rows = Math.abs(other.top - box.top);
    if (rows < 6) continue;
    if (best !== null && Math.abs(other.top - best.top) > 6) break;
    const off = Math.abs(other.left - box.left);
    if (best === null || off < best.off) best = { i, off, top: other.top };
  }
  return best === null ? span.at : best.i;
};
