// What is known of one token: fate, numbers, and both models' lists side by side.
T.why = function (rollout, token) {
  const rank = T.columns.rank[token];
  if (!rollout.numValid) return T.kept(token) ? "kept" : "";
  if (rank === 0 && rollout.cut) return T.kept(token) ? "kept" : "not kept: no candidate for this selector";
  const place = `rank ${T.whole(rank)} of ${T.whole(rollout.numValid)}`;
  const anchor = T.anchored(token) ? "; held by the anchor" : "";
  // A budget of each completion or teacher, or a draw: no rank of the batch decided.
  if (!rollout.cut) return `${T.kept(token) ? "kept" : "not kept"}${rank ? `: ${place}` : ""}${anchor}`;
  const cut = `cut at ${T.whole(rollout.cut)}`;
  if (T.kept(token)) {
    return rank <= rollout.cut ? `kept: ${place}; ${cut}` : `kept by min_keep: ${place}; ${cut}`;
  }
  return `not kept: ${place}; ${cut}${anchor}`;
};

T.details = function (rollout, token) {
  const box = document.getElementById("details");
  const head = T.element("h4", "", T.label(T.word(token)));
  const why = T.element("p", T.kept(token) ? "why yes" : "why", T.why(rollout, token));
  const parts = [head];
  if (why.textContent) parts.push(why);
  parts.push(T.numbers(token));
  const tops = T.element("div", "tops");
  for (const model of ["student", "teacher"]) tops.append(T.bars(model, token));
  if (T.top("student", token).length + T.top("teacher", token).length) parts.push(tops);
  const least = `Tokens below ${+(100 * T.floor).toPrecision(2)} % in both models are left out.`;
  if (parts.includes(tops)) parts.push(T.element("p", "note", least));
  box.replaceChildren(...parts);
};

T.numbers = function (token) {
  const list = T.element("dl", "numbers");
  const quadrant = T.columns.quadrant[token];
  const shown = T.offered().filter((name) => name !== "kept").map((name) => [
    `${T.signals[name].short}${T.signals[name].unit.startsWith("nats") ? ", nats" : ""}`,
    T.format(T.value(name, token)),
  ]);
  const known = shown.filter(([, value]) => value !== "–");
  if (quadrant) known.push(["quadrant", `Q${quadrant}`]);
  for (const [name, value] of known) {
    const pair = T.element("div");
    pair.append(T.element("dt", "", name), T.element("dd", "", value));
    list.append(pair);
  }
  return list;
};

T.bars = function (model, token) {
  const box = T.element("div");
  box.append(T.element("h5", "", model));
  const list = T.element("ol");
  const sampled = T.word(token);
  let found = false;
  for (const { word, p } of T.top(model, token)) {
    const item = T.element("li", word === sampled ? "sampled" : "");
    found = found || word === sampled;
    const bar = T.element("span", "bar");
    // Below one per cent a bar would be a speck.
    bar.style.width = p < 0.01 ? "0" : `${100 * p}%`;
    const name = T.element("span", "word", `${word === sampled ? "▸" : ""}${T.label(word)}`);
    item.append(bar, name, T.element("span", "p", T.percent(p)));
    list.append(item);
  }
  box.append(list);
  const logprob = T.value(`${model}_logprob`, token);
  if (!found && !Number.isNaN(logprob)) {
    box.append(T.element("div", "absent", `sampled token not listed: ${T.percent(Math.exp(logprob))}`));
  }
  return box;
};
