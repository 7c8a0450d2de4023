// The list of rollouts with filters and order, the choice of signal and of a second side; starts it all.
T.state = { signal: "disagreement", rollout: null, beside: null, brush: null, text: null, at: 0 };
T.orders = {
  logged: (a, b) => a.index - b.index,
  taught: (a, b) => b.kept - a.kept,
  disagreement: (a, b) => b.meanD - a.meanD,
  incompatible: (a, b) => b.meanI - a.meanI,
};

T.byId = (id) => document.getElementById(id);

T.matching = function () {
  const run = T.byId("run").value;
  const teacher = T.byId("teacher").value;
  const words = T.byId("search").value.toLowerCase();
  return T.rollouts
    .filter((rollout) => run === "" || rollout.run === run)
    .filter((rollout) => teacher === "" || rollout.teacher === teacher)
    .filter((rollout) => !T.byId("truncated").checked || rollout.truncated)
    .filter((rollout) => !T.byId("wrong").checked || rollout.correct === false)
    .filter((rollout) => words === "" || rollout.prompt.toLowerCase().includes(words))
    .sort(T.orders[T.byId("order").value]);
};

T.fillList = function () {
  const found = T.matching();
  const list = T.byId("list");
  list.replaceChildren(
    ...found.map((rollout) => {
      const button = T.element("button");
      const head = T.element("span", "head");
      const marks = [rollout.correct === false ? "wrong" : "", rollout.truncated ? "cut" : ""];
      head.append(T.element("span", "", T.title(rollout)), T.element("span", "", marks.filter(Boolean).join(" ")));
      button.append(head, T.element("span", "sub", rollout.prompt.slice(0, 80)));
      const facts = rollout.kept === null ? [] : [`${T.share(rollout.kept, 0)} kept`];
      for (const [name, mean] of [["disagreement", rollout.meanD], ["incompatible", rollout.meanI]]) {
        if (mean !== null) facts.push(`${T.signals[name].short} ${T.format(mean)}`);
      }
      button.append(T.element("span", "sub", facts.join(", ")));
      button.addEventListener("click", () => T.show(rollout, null));
      button.rollout = rollout;
      return button;
    }),
  );
  T.byId("count").textContent = `${T.whole(found.length)} of ${T.whole(T.rollouts.length)} rollouts`;
  if (found.length && !found.includes(T.state.rollout)) T.show(found[0], null);
  else T.markCurrent();
};

T.markCurrent = function () {
  for (const button of T.byId("list").children) {
    const current = button.rollout === T.state.rollout;
    button.setAttribute("aria-current", String(current));
    const list = button.parentElement;
    const hidden = button.offsetTop < list.scrollTop || button.offsetTop + button.offsetHeight > list.scrollTop + list.clientHeight;
    if (current && hidden) list.scrollTop = button.offsetTop - list.clientHeight / 3;
  }
};

// Rollouts worth putting beside this one: the same completion seen by others, then the same prompt.
T.partners = function (rollout) {
  const same = (a, b) => {
    if (a.n !== b.n) return false;
    for (let i = 0; i < a.n; i += 1) {
      if (T.columns.token[a.start + i] !== T.columns.token[b.start + i]) return false;
    }
    return true;
  };
  const others = T.rollouts.filter((other) => other !== rollout && other.prompt === rollout.prompt);
  const graded = others.map((other) => ({ other, same: same(rollout, other) }));
  return graded.sort((a, b) => Number(b.same) - Number(a.same)).slice(0, 40);
};

T.show = function (rollout, beside) {
  Object.assign(T.state, { rollout, beside, brush: null });
  rollout.pair = rollout.index;
  const choice = T.byId("beside");
  const partners = T.partners(rollout);
  const none = T.element("option", "", partners.length ? "nothing" : "no rollout of this prompt elsewhere");
  none.value = "";
  choice.replaceChildren(none);
  for (const { other, same } of partners) {
    other.pair = same ? rollout.index : null;
    const option = T.element("option", "", `${same ? "same completion" : "same prompt"}: ${T.title(other)}`);
    option.value = String(other.index);
    option.selected = other === beside;
    choice.append(option);
  }
  choice.disabled = partners.length === 0;
  const sides = T.byId("sides");
  const shown = beside ? [rollout, beside] : [rollout];
  sides.className = beside ? "sides two" : "sides";
  sides.replaceChildren(...shown.map(T.side));
  T.markCurrent();
  T.setBrush(null);
  T.point(T.texts()[0], 0);
};

T.options = function (select, pairs) {
  for (const [value, text] of pairs) {
    const option = T.element("option", "", text);
    option.value = value;
    select.append(option);
  }
};

T.start = async function () {
  if (!T.byId("rollouts")) return;
  if (typeof DecompressionStream === "undefined") {
    T.byId("inspector-state").textContent = "This browser cannot inflate the data (DecompressionStream).";
    return;
  }
  await T.load();
  const offered = T.offered();
  T.options(T.byId("signal"), offered.map((name) => [name, T.signals[name].name]));
  T.state.signal = offered.includes("learnable") ? "learnable" : offered[0];
  T.byId("signal").value = T.state.signal;
  const runs = [...new Set(T.rollouts.map((rollout) => rollout.run))];
  T.options(T.byId("run"), [["", "all"], ...runs.map((run) => [run, run])]);
  // A run with one teacher gives it no name, and needs no choice.
  const teachers = [...new Set(T.rollouts.map((rollout) => rollout.teacher).filter(Boolean))].sort();
  T.options(T.byId("teacher"), [["", "all"], ...teachers.map((name) => [name, name])]);
  T.byId("teacher").parentNode.hidden = teachers.length === 0;
  T.byId("signal").addEventListener("change", (event) => {
    T.state.signal = event.target.value;
    T.legend(T.state.signal);
    T.reshade();
  });
  for (const id of ["run", "teacher", "order", "truncated", "wrong"]) T.byId(id).addEventListener("change", T.fillList);
  T.byId("search").addEventListener("input", T.fillList);
  T.byId("beside").addEventListener("change", (event) => {
    T.show(T.state.rollout, T.rollouts[event.target.value] || null);
  });
  T.listen(T.byId("sides"));
  T.listenScatter();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", T.draw);
  T.legend(T.state.signal);
  // The rollout that the first selection taught the most (controls come last): what a reader came to see.
  const selective = T.rollouts.filter((rollout) => rollout.kept > 0 && rollout.kept < 1);
  const taught = selective.filter((rollout) => rollout.run === selective[0].run);
  const most = taught.sort((a, b) => b.kept * b.n - a.kept * a.n || b.meanD - a.meanD)[0];
  if (most) T.show(most, null);
  T.fillList();
  T.markCurrent();
  T.byId("inspector-state").textContent = "";
  document.documentElement.dataset.ready = "true";
};

document.documentElement.classList.add("js");
T.start();
