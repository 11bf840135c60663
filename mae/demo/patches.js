// A picture whose patches are painted (hidden or shown) or chosen, with pointer or keys. data-mask is "0110…", or empty
// if a patch is to be chosen. Events: painted {mask}, chosen {patch}.
let mask, place, stroke = null, last;
const spoken = document.createElement("p");  // outside of the part that is rendered again
Object.assign(spoken, { className: "unseen", ariaLive: "polite" });
element.after(spoken);

const field = () => element.querySelector(".patches");
const shape = () => [Number(field().dataset.rows), Number(field().dataset.columns)];

function read() {
  if (!field() || stroke !== null) return;
  const { mask: hidden, chosen } = field().dataset;
  mask = hidden ? Array.from(hidden, Number) : null;
  if (chosen !== "") place = Number(chosen);
  place ??= 0;
  draw();
}

function draw() {
  const [rows, columns] = shape(), canvas = field().querySelector("canvas").getContext("2d");
  canvas.clearRect(0, 0, columns, rows);
  canvas.fillStyle = "#808080";
  mask?.forEach((hidden, i) => hidden && canvas.fillRect(i % columns, Math.floor(i / columns), 1, 1));
  const cursor = field().querySelector("i"), row = Math.floor(place / columns), column = place % columns;
  Object.assign(cursor.style, {
    left: `${100 * column / columns}%`, top: `${100 * row / rows}%`, width: `${100 / columns}%`, height: `${100 / rows}%`,
  });
}

function tell() {
  const columns = shape()[1], state = mask ? (mask[place] ? ", hidden" : ", visible") : "";
  spoken.textContent = `row ${Math.floor(place / columns) + 1}, column ${place % columns + 1}${state}`;
}

// Returns the patch under the pointer, the nearest one if the pointer has left the picture.
function under(event) {
  const box = field().getBoundingClientRect(), [rows, columns] = shape();
  const inside = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
  return [inside((event.clientY - box.top) / box.height, rows), inside((event.clientX - box.left) / box.width, columns)];
}

// Paints all patches between two points of a stroke, since a fast pointer skips some.
function paint(from, to) {
  const columns = shape()[1], steps = Math.max(1, Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]));
  for (let step = 0; step <= steps; step++) {
    const [row, column] = [0, 1].map((i) => Math.round(from[i] + (to[i] - from[i]) * step / steps));
    place = row * columns + column;
    mask[place] = stroke;
  }
  draw();
}

function act() {
  if (mask) trigger("painted", { mask: mask.join("") });
  else trigger("chosen", { patch: place });
}

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".patches") || event.button !== 0) return;
  last = under(event);
  place = last[0] * shape()[1] + last[1];
  if (!mask) return draw(), act();
  stroke = 1 - mask[place];
  field().setPointerCapture(event.pointerId);
  paint(last, last);
});
element.addEventListener("pointermove", (event) => {
  if (stroke === null) return;
  const here = under(event);
  paint(last, here);
  last = here;
});
for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => {
    if (stroke === null) return;
    stroke = null;
    act();
  });
}
element.addEventListener("keydown", (event) => {
  if (!event.target.closest(".patches")) return;
  const [rows, columns] = shape(), row = Math.floor(place / columns), column = place % columns;
  const moves = {
    ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
  };
  const pressed = event.key === " " || event.key === "Enter", to = moves[event.key];
  if (!pressed && !to) return;
  event.preventDefault();
  if (to && to[0] >= 0 && to[0] < rows && to[1] >= 0 && to[1] < columns) place = to[0] * columns + to[1];
  if (pressed && mask) mask[place] = 1 - mask[place];
  draw();
  tell();
  if (pressed) act();
});
watch("value", read);
read();
