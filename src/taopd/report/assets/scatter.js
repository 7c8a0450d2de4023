// D against C of the rollout on show, brushed with pointer or with the four number fields.
T.SIZE = { width: 420, height: 260, left: 44, bottom: 34, top: 24, right: 12 };

T.inBrush = function (token) {
  const { brush } = T.state;
  const d = T.value("disagreement", token);
  const c = T.value("compatibility", token);
  return d >= brush.d0 && d <= brush.d1 && c >= brush.c0 && c <= brush.c1;
};

T.axes = function () {
  const s = T.SIZE;
  const to = T.state.rollout ? T.state.maxD : 1;
  const from = T.state.rollout ? T.state.minC : 0;
  return {
    // Both axes by square roots, from D = 0 and from C = 1: most tokens of a trained student lie close to both.
    x: (c) => s.left + (1 - Math.sqrt(Math.max(0, 1 - c) / (1 - from))) * (s.width - s.left - s.right),
    y: (d) => s.height - s.bottom - Math.sqrt(d / to) * (s.height - s.bottom - s.top),
    c: (x) => 1 - (1 - from) * (1 - Math.max(0, Math.min(1, (x - s.left) / (s.width - s.left - s.right)))) ** 2,
    d: (y) => to * Math.max(0, Math.min(1, (s.height - s.bottom - y) / (s.height - s.bottom - s.top))) ** 2,
    to,
    from,
  };
};

T.color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

T.draw = function () {
  const canvas = document.getElementById("scatter");
  const { rollout } = T.state;
  const s = T.SIZE;
  const scale = ((window.devicePixelRatio || 1) * (canvas.clientWidth || s.width)) / s.width;
  canvas.width = Math.round(s.width * scale);
  canvas.height = Math.round(s.height * scale);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.scale(scale, scale);
  pen.clearRect(0, 0, s.width, s.height);
  if (!rollout) return;
  T.state.maxD = T.largest(rollout);
  T.state.minC = T.floorOfC(rollout);
  const axes = T.axes();
  T.frame(pen, axes);
  for (const kept of [false, true]) {
    for (let token = rollout.start; token < rollout.start + rollout.n; token += 1) {
      if (T.kept(token) !== kept) continue;
      const faded = T.state.brush && !T.inBrush(token);
      pen.globalAlpha = faded ? 0.15 : kept ? 0.95 : 0.5;
      pen.fillStyle = T.color(kept ? "--accent" : "--c3");
      const x = axes.x(T.value("compatibility", token));
      const y = axes.y(T.value("disagreement", token));
      pen.beginPath();
      if (kept) pen.rect(x - 3, y - 3, 6, 6);
      else pen.arc(x, y, 2.4, 0, 7);
      pen.fill();
    }
  }
  pen.globalAlpha = 1;
  T.frameBrush(pen, axes);
  T.picture = pen.getImageData(0, 0, canvas.width, canvas.height);
};

T.largest = function (rollout) {
  let to = 0;
  for (let i = 0; i < rollout.n; i += 1) {
    const d = T.value("disagreement", rollout.start + i);
    if (d > to) to = d;
  }
  return to || 1;
};

// Where all of C is close to 1 the axis begins at the tenth below the smallest, else at 0.
T.floorOfC = function (rollout) {
  let from = 1;
  for (let i = 0; i < rollout.n; i += 1) {
    const c = T.value("compatibility", rollout.start + i);
    if (c < from) from = c;
  }
  return from < 0.5 ? 0 : Math.min(0.9, Math.floor(10 * from) / 10);
};

T.frame = function (pen, axes) {
  const s = T.SIZE;
  pen.strokeStyle = T.color("--line");
  pen.fillStyle = T.color("--soft");
  pen.font = "12px system-ui, sans-serif";
  pen.beginPath();
  pen.moveTo(s.left, s.top);
  pen.lineTo(s.left, s.height - s.bottom);
  pen.lineTo(s.width - s.right, s.height - s.bottom);
  pen.stroke();
  pen.textAlign = "center";
  for (const share of [1, 0.25, 0]) {
    const c = 1 - (1 - axes.from) * share;
    pen.fillText(String(Number(c.toFixed(3))), axes.x(c), s.height - s.bottom + 15);
  }
  pen.fillText("C (square-root scale from 1)", s.width / 2 + 16, s.height - 4);
  pen.textAlign = "right";
  for (const share of [0, 0.25, 1]) pen.fillText(T.format(axes.to * share), s.left - 5, axes.y(axes.to * share) + 4);
  pen.textAlign = "left";
  // Above the frame: a token may lie anywhere inside it.
  pen.fillText("D, nats (square-root scale)", s.left - 1, s.top - 9);
};

T.frameBrush = function (pen, axes) {
  const { brush } = T.state;
  if (!brush) return;
  const y = axes.y(Math.min(brush.d1, axes.to));
  pen.strokeStyle = T.color("--ink");
  pen.setLineDash([4, 3]);
  pen.strokeRect(axes.x(brush.c0), y, axes.x(brush.c1) - axes.x(brush.c0), axes.y(brush.d0) - y);
  pen.setLineDash([]);
};

// A ring around the token pointed at, over the picture that is already there.
T.ring = function (token) {
  const canvas = document.getElementById("scatter");
  if (!T.picture || !T.state.rollout) return;
  const pen = canvas.getContext("2d");
  pen.putImageData(T.picture, 0, 0);
  const axes = T.axes();
  pen.strokeStyle = T.color("--ink");
  pen.lineWidth = 1.6;
  pen.beginPath();
  pen.arc(axes.x(T.value("compatibility", token)), axes.y(T.value("disagreement", token)), 7, 0, 7);
  pen.stroke();
};

T.setBrush = function (brush) {
  T.state.brush = brush;
  for (const name of ["d0", "d1", "c0", "c1"]) {
    const field = document.getElementById(`range-${name}`);
    const known = brush && Number.isFinite(brush[name]);
    if (document.activeElement !== field) field.value = known ? Number(brush[name].toPrecision(3)) : "";
  }
  let inside = 0;
  const { rollout } = T.state;
  for (let i = 0; brush && i < rollout.n; i += 1) inside += T.inBrush(rollout.start + i) ? 1 : 0;
  document.getElementById("brushed").textContent = brush
    ? `${T.whole(inside)} of ${T.whole(rollout.n)} tokens, bright in the text`
    : "Squares: kept. Drag over the picture, or fill in numbers.";
  T.draw();
  T.reshade();
};

T.listenScatter = function () {
  const canvas = document.getElementById("scatter");
  let from = null;
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const axes = T.axes();
    const scale = T.SIZE.width / box.width;
    return { c: axes.c((event.clientX - box.left) * scale), d: axes.d((event.clientY - box.top) * scale) };
  };
  const between = (a, b) => ({
    c0: Math.min(a.c, b.c), c1: Math.max(a.c, b.c), d0: Math.min(a.d, b.d), d1: Math.max(a.d, b.d),
  });
  canvas.addEventListener("pointerdown", (event) => {
    from = at(event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (from) T.setBrush(between(from, at(event)));
  });
  canvas.addEventListener("pointerup", (event) => {
    const to = at(event);
    const moved = from && (Math.abs(to.c - from.c) > 0.005 || Math.abs(to.d - from.d) > 1e-9);
    if (from && !moved) T.setBrush(null);
    from = null;
  });
  const fields = ["d0", "d1", "c0", "c1"].map((name) => document.getElementById(`range-${name}`));
  for (const field of fields) {
    field.addEventListener("input", () => {
      if (fields.every((each) => each.value === "")) return T.setBrush(null);
      const [d0, d1, c0, c1] = fields.map((each) => (each.value === "" ? null : Number(each.value)));
      return T.setBrush({ d0: d0 ?? 0, d1: d1 ?? Infinity, c0: c0 ?? 0, c1: c1 ?? 1 });
    });
  }
  document.getElementById("clear").addEventListener("click", () => T.setBrush(null));
};
