"use strict";

// Charts: the values at the step under the pointer or chosen with the arrow keys.
for (const plot of document.querySelectorAll(".plot")) {
  const lines = JSON.parse(plot.dataset.lines);
  const end = Number(plot.dataset.end);
  const unit = plot.dataset.unit ? " " + plot.dataset.unit : "";
  const steps = [...new Set(lines.flatMap((line) => line.points[0]))].sort((a, b) => a - b);
  const cursor = plot.querySelector(".cursor");
  const tip = plot.querySelector(".tip");
  let place = steps.length; // among the steps; beyond the last one until the chart is used

  const nearest = (sorted, step) => {
    let low = 0;
    let high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < step) low = middle;
      else high = middle;
    }
    return step - sorted[low] < sorted[high] - step ? low : high;
  };
  const add = (parent, tag, text) => parent.appendChild(Object.assign(document.createElement(tag), { textContent: text }));

  const show = (index) => {
    place = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[place];
    tip.replaceChildren();
    add(tip, "b", "step " + step.toLocaleString("en"));
    for (const line of lines) {
      const [at, values] = line.points;
      const index = nearest(at, step);
      const row = add(tip, "span", "");
      add(row, "i", line.label).className = "c" + line.colour;
      const elsewhere = at[index] === step ? "" : " at " + at[index].toLocaleString("en");
      add(row, "span", values[index].toLocaleString("en", { maximumSignificantDigits: 4 }) + unit + elsewhere);
    }
    cursor.hidden = tip.hidden = false;
    const share = step / end;
    cursor.style.left = 100 * share + "%";
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * share}% + 10px)`;
  };
  const hide = () => { cursor.hidden = tip.hidden = true; };

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest(steps, ((event.clientX - box.left) / box.width) * end));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, PageUp: place - far, PageDown: place + far, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

// Reconstructions: those of the step chosen with the slider.
for (const slides of document.querySelectorAll(".slides")) {
  const { steps, rebuilt } = JSON.parse(slides.querySelector("script").textContent);
  const slider = slides.querySelector("input");
  const pictures = slides.querySelectorAll("img.reconstructed");
  slider.addEventListener("input", () => {
    const step = steps[slider.value].toLocaleString("en");
    slides.querySelector("output").textContent = step;
    slider.setAttribute("aria-valuetext", "step " + step);
    rebuilt[slider.value].forEach((source, image) => { pictures[image].src = source; });
  });
}
