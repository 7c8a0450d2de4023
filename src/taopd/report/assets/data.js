// The packed columns: inflate them, and read a token's numbers. Writes nothing to the page.
T.load = async function () {
  const described = JSON.parse(document.getElementById("rollouts").textContent);
  const coded = atob(document.getElementById("columns").textContent.trim());
  const bytes = Uint8Array.from(coded, (character) => character.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const stream = new Uint8Array(await new Response(inflated).arrayBuffer());
  T.words = described.words;
  T.rollouts = described.rollouts.map((rollout, index) => ({ ...rollout, index }));
  T.floor = described.floor;
  // Per signal: name, short name, unit, ramp ("s" blue, "o" orange), value of the darkest level or null.
  T.signals = described.signals;
  T.columns = {};
  for (const [name, column] of Object.entries(described.columns)) {
    T.columns[name] = T.decode(stream, column);
  }
  for (const model of ["student", "teacher"]) {
    const counts = T.columns[`${model}_count`];
    const starts = new Uint32Array(counts.length + 1);
    for (let i = 0; i < counts.length; i += 1) starts[i + 1] = starts[i] + counts[i];
    T.columns[`${model}_start`] = starts;
  }
  T.findTeacherWords();
};

// The teacher's words: a place in the student's list of the same token, or the next one written out.
T.findTeacherWords = function () {
  const { teacher_place: places, teacher_start: starts, teacher_word: written } = T.columns;
  const words = new Uint32Array(places.length);
  let next = 0;
  for (let token = 0; token + 1 < starts.length; token += 1) {
    for (let at = starts[token]; at < starts[token + 1]; at += 1) {
      if (places[at] === 0) {
        words[at] = written[next];
        next += 1;
      } else words[at] = T.columns.student_word[T.columns.student_start[token] + places[at] - 1];
    }
  }
  T.columns.teacher_word = words;
};

// Byte planes to numbers; a column with "low" is coded by signed square roots between low and high.
T.decode = function (stream, column) {
  const whole = new Uint32Array(column.n);
  for (let place = 0; place < column.width; place += 1) {
    const at = column.at + place * column.n;
    for (let i = 0; i < column.n; i += 1) whole[i] += stream[at + i] * 2 ** (8 * place);
  }
  if (!("low" in column)) return whole;
  const values = new Float32Array(column.n);
  const root = (value) => Math.sign(value) * Math.sqrt(Math.abs(value));
  const start = root(column.low);
  const step = (root(column.high) - start) / 1023;
  for (let i = 0; i < column.n; i += 1) {
    const at = start + step * whole[i];
    values[i] = whole[i] === 65535 ? NaN : at * Math.abs(at);
  }
  return values;
};

T.value = (name, token) => (T.columns[name] ? T.columns[name][token] : NaN);
T.kept = (token) => (T.columns.flags[token] & 1) === 1;
T.anchored = (token) => (T.columns.flags[token] & 2) === 2;
T.word = (token) => T.words[T.columns.token[token]];

// A model's list at a token: words and probabilities, best first.
T.top = function (model, token) {
  const starts = T.columns[`${model}_start`];
  const entries = [];
  for (let at = starts[token]; at < starts[token + 1]; at += 1) {
    const p = (T.columns[`${model}_p`][at] / 255) ** 2;
    entries.push({ word: T.words[T.columns[`${model}_word`][at]], p });
  }
  return entries;
};

// Numbers as a reader wants them: three digits, no exponent, "<0.001" where less would be noise.
T.format = function (value) {
  if (Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001) return value < 0 ? "−<0.001" : "<0.001";
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toFixed(digits).replace("-", "−");
};
T.percent = (p) => {
  if (p < 0.001) return "<0.1 %";
  return p < 0.995 ? `${(100 * p).toFixed(p < 0.1 ? 1 : 0)} %` : ">99 %";
};
// A share with more places where it would read 0 or 100 and is neither.
T.share = function (share, digits) {
  const texts = [0, 1, 2].map((more) => (100 * share).toFixed(digits + more));
  if (share === 0 || share === 1) return `${texts[0]} %`;
  const told = texts.find((text) => Number(text) > 0 && Number(text) < 100);
  const least = 10 ** -(digits + 2);
  return `${told ?? (share < 0.5 ? `<${least}` : `>${100 - least}`)} %`;
};
// A word on its own: a leading space is part of it, a trailing one only keeps words apart.
T.label = (word) => word.replace(/ $/, "").replace(/^ /, "␣") || "␣";
T.whole = (value) => value.toLocaleString("en-US");
T.element = function (tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
