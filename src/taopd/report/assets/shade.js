// How a signal is binned, and the legend. Levels 0 to 7, "s" blue, "o" orange.
T.offered = () => Object.keys(T.signals).filter((name) => name === "kept" || T.columns[name]);

// The scale of a signal is that of all tokens in the report: its 99th percentile is the darkest level.
T.scale = function (name) {
  T.scales = T.scales || {};
  if (T.scales[name]) return T.scales[name];
  const known = T.signals[name];
  let to = known.to;
  if (!to && name !== "kept") {
    const sizes = T.columns[name].filter((value) => !Number.isNaN(value)).map(Math.abs).sort();
    to = sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1] : 1;
  }
  // Square-root steps: most tokens are near 0, and they should not all look alike.
  const power = known.to ? 1 : 2;
  T.scales[name] = { to: to || 1, power };
  return T.scales[name];
};

T.shade = function (name, token) {
  if (name === "kept") return T.kept(token) ? "s5" : "";
  const value = T.value(name, token);
  if (Number.isNaN(value)) return "";
  const { to, power } = T.scale(name);
  const level = Math.min(7, Math.floor(8 * Math.min(1, Math.abs(value) / to) ** (1 / power)));
  if (level === 0) return "";
  return (value < 0 ? "o" : T.signals[name].ramp) + level;
};

T.legend = function (name) {
  const box = document.getElementById("legend");
  const known = T.signals[name];
  const list = T.element("ol");
  if (name === "kept") {
    list.append(T.element("li", "", "not"), T.element("li", "s5", "kept"));
  } else {
    const { to, power } = T.scale(name);
    for (let level = 0; level < 8; level += 1) {
      const from = to * (level / 8) ** power;
      const item = T.element("li", level ? known.ramp + level : "", level ? T.format(from) : "0");
      item.title = `from ${T.format(from)}`;
      list.append(item);
    }
  }
  const words = name === "kept" ? known.unit : `${known.unit}; each box from its number on`;
  box.replaceChildren(T.element("span", "", known.name), list, T.element("span", "", words));
  box.append(T.element("span", "", "▁ underlined: kept   ┄ dotted: anchored"));
};
