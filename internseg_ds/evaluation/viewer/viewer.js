// Draws what contents.py hands over. gradio calls this once, with `element`, `props` and `watch`.
const part = (selector) => element.querySelector(selector);
const percent = (share) => (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %";
let shown = null; // {labels, scores, classes by label, and the sizes of contents.py}
let latest = 0;

async function bytesOf(base64) {
  const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// The labels in their colours; of one class alone where `only` is given.
function paint(only) {
  const { shown_width: width, shown_height: height, labels, classes } = shown;
  const colours = new Uint32Array(65536); // as bytes: r, g, b, opacity
  const bytes = new Uint8Array(colours.buffer);
  for (const row of classes.values()) {
    if (row.colour && (only === undefined || only === row.label)) bytes.set([...row.colour, 255], 4 * row.label);
  }
  const pixels = new Uint32Array(width * height);
  for (let place = 0; place < pixels.length; place++) pixels[place] = colours[labels[place]];
  const canvas = part(".tint");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), width, height), 0, 0);
}

function fade() {
  part(".tint").style.opacity = part(".strength input").value / 100;
}

function rowOf(row) {
  const line = document.createElement("tr");
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  if (row.colour) swatch.style.background = `rgb(${row.colour.join(",")})`;
  line.insertCell().append(swatch);
  for (const text of [row.name, percent(row.share), percent(row.score)]) line.insertCell().textContent = text;
  line.addEventListener("pointerenter", () => paint(row.label));
  line.addEventListener("pointerleave", () => paint());
  return line;
}

// The class under the pointer, with its score and the image's own pixel.
function point(event) {
  const { width, height, shown_width, shown_height, labels, scores, classes } = shown;
  const box = part(".frame").getBoundingClientRect();
  const photo = part(".photo").getBoundingClientRect();
  const column = Math.floor(((event.clientX - photo.left) / photo.width) * shown_width);
  const row = Math.floor(((event.clientY - photo.top) / photo.height) * shown_height);
  const under = part(".under");
  under.hidden = column < 0 || row < 0 || column >= shown_width || row >= shown_height;
  if (under.hidden) return;
  const place = row * shown_width + column;
  const x = Math.floor(((2 * column + 1) * width) / (2 * shown_width));
  const y = Math.floor(((2 * row + 1) * height) / (2 * shown_height));
  under.textContent = `${classes.get(labels[place]).name} · ${percent(scores[place] / 255)} · x ${x}, y ${y}`;
  Object.assign(under.dataset, { label: labels[place], x, y });
  const left = event.clientX - box.left + 14;
  under.style.left = Math.max(0, Math.min(left, box.width - under.offsetWidth)) + "px";
  const above = event.clientY - box.top - under.offsetHeight - 10;
  under.style.top = (above < 0 ? event.clientY - box.top + 18 : above) + "px";
}

async function draw() {
  const turn = ++latest;
  const given = props.value ? JSON.parse(props.value) : null;
  const fault = given && given.fault;
  let buffer = null;
  if (given && !fault) {
    buffer = await bytesOf(given.labels);
    if (turn !== latest) return; // another image came meanwhile
  }
  part(".hint").hidden = Boolean(given);
  part(".fault").hidden = !fault;
  part(".fault").textContent = fault || "";
  part(".result").hidden = !buffer;
  part(".under").hidden = true;
  if (!buffer) return;
  const count = given.shown_width * given.shown_height;
  shown = {
    ...given,
    labels: new Uint16Array(buffer, 0, count),
    scores: new Uint8Array(buffer, 2 * count, count),
    classes: new Map(given.classes.map((row) => [row.label, row])),
  };
  part(".photo").src = given.photo;
  const sides = given.shown_width / given.shown_height;
  part(".left").style.maxWidth = `min(${Math.max(given.shown_width, 480)}px, calc(78vh * ${sides}))`;
  part(".summary").textContent =
    `${given.name}: ${given.width} x ${given.height} pixels, mean score ${percent(given.mean_score)}` +
    (given.width !== given.shown_width ? `; shown at ${given.shown_width} x ${given.shown_height}` : "");
  part("tbody").replaceChildren(...given.classes.map(rowOf));
  paint();
  fade();
}

part(".strength input").addEventListener("input", fade);
for (const name of ["pointermove", "pointerdown"]) part(".frame").addEventListener(name, point);
part(".frame").addEventListener("pointerleave", () => { part(".under").hidden = true; });
watch("value", draw);
draw();
