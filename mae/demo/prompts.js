// A photograph on which points are marked and a box is drawn, with pointer or keys. Events, in shares of width and height:
// marked {x, y, other}, where other asks for the other label than the chosen one; boxed {box: [x0, y0, x1, y1]}.
const DRAGGED = 5;  // pixels of the screen from which a click is a drag
let start = null, place = [0.5, 0.5], corner = null;
const spoken = document.createElement("p");  // outside of the part that is rendered again
Object.assign(spoken, { className: "unseen", ariaLive: "polite" });
element.after(spoken);

const field = () => element.querySelector(".prompts");
const percent = (share) => `${100 * share}%`;

// Returns where the pointer is, the nearest point of the photograph if it has left it.
function under(event) {
  const box = field().getBoundingClientRect(), inside = (share) => Math.min(1, Math.max(0, share));
  return [inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
}

function between(from, to) {
  return [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
}

// Shows the cross of the keyboard, and the box that is being drawn from a corner.
function draw(from) {
  const [cross, band] = field().querySelectorAll("i");
  Object.assign(cross.style, { left: percent(place[0]), top: percent(place[1]) });
  band.hidden = from === null;
  if (from === null) return;
  const [x0, y0, x1, y1] = between(from, place);
  Object.assign(band.style, { left: percent(x0), top: percent(y0), width: percent(x1 - x0), height: percent(y1 - y0) });
}

function finish(from, other) {
  if (from === null) trigger("marked", { x: place[0], y: place[1], other });
  else trigger("boxed", { box: between(from, place) });
}

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".prompts") || ![0, 2].includes(event.button)) return;
  place = under(event);
  start = { at: place, x: event.clientX, y: event.clientY, dragged: false, other: event.button === 2 || event.shiftKey };
  field().setPointerCapture(event.pointerId);
  draw(null);
});
element.addEventListener("pointermove", (event) => {
  if (start === null) return;
  place = under(event);
  start.dragged ||= Math.hypot(event.clientX - start.x, event.clientY - start.y) > DRAGGED;
  draw(start.dragged ? start.at : null);
});
element.addEventListener("pointerup", () => {
  if (start === null) return;
  const { at, dragged, other } = start;
  start = null;
  if (!dragged) place = at;
  draw(null);
  finish(dragged ? at : null, other);
});
element.addEventListener("pointercancel", () => {
  start = null;
  if (field()) draw(null);
});
element.addEventListener("contextmenu", (event) => {
  if (event.target.closest(".prompts")) event.preventDefault();
});
element.addEventListener("keydown", (event) => {
  if (!event.target.closest(".prompts")) return;
  const step = event.shiftKey ? 0.1 : 0.02;
  const move = { ArrowUp: [0, -step], ArrowDown: [0, step], ArrowLeft: [-step, 0], ArrowRight: [step, 0] }[event.key];
  const mark = event.key === " " || event.key === "Enter", box = event.key.toLowerCase() === "b";
  if (!move && !mark && !box) return;
  event.preventDefault();
  if (move) place = place.map((share, i) => Math.min(1, Math.max(0, share + move[i])));
  if (mark) finish(null, event.shiftKey);
  if (box && corner !== null) finish(corner, false);
  if (box) corner = corner === null ? place : null;
  draw(corner);
  spoken.textContent = `${Math.round(100 * place[0])} % from the left, ${Math.round(100 * place[1])} % from the top`;
});
watch("value", () => field() && draw(corner));
draw(null);
