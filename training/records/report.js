// The charts' read-out: shows the logged step nearest to the pointer; arrow keys move it.
"use strict";

function nearest(points, x) {
  let best = 0;
  for (let i = 1; i < points.length; i++) {
    if (Math.abs(points[i][0] - x) < Math.abs(points[best][0] - x)) best = i;
  }
  return best;
}

function attach(plot) {
  const lines = JSON.parse(plot.dataset.lines).filter((line) => line.points.length);
  if (!lines.length) return;
  const cursor = plot.querySelector(".cursor");
  const readout = plot.querySelector(".readout");
  const lead = (lines.find((line) => line.style === "main") ?? lines[0]).points;
  let at = lead.length - 1;

  function row(text, style) {
    const element = document.createElement("div");
    element.textContent = text;
    element.className = style;
    return element;
  }

  function show(index) {
    at = Math.max(0, Math.min(lead.length - 1, index));
    const x = lead[at][0];
    const rows = [row(`${plot.dataset.unit} ${lead[at][2]}`, "step")];
    for (const line of lines) {
      // of many trials only those that stand out: the rest would hide the chart
      if (lines.length > 8 && line.style.startsWith("trial")) continue;
      const point = line.points[nearest(line.points, x)];
      // held-out values are sparse, so show them only close to the pointer
      if (Math.abs(point[0] - x) <= 12) rows.push(row(`${line.label} ${point[3]}`, line.style));
    }
    readout.replaceChildren(...rows);
    readout.hidden = cursor.hidden = false;
    cursor.style.left = `${x / 10}%`;
    readout.style.left = x < 500 ? `calc(${x / 10}% + 10px)` : "";
    readout.style.right = x < 500 ? "" : `calc(${100 - x / 10}% + 10px)`;
  }

  function hide() {
    readout.hidden = cursor.hidden = true;
  }

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(nearest(lead, (1000 * (event.clientX - box.left)) / box.width));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && show(at));
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    show(at + by);
  });
}

document.querySelectorAll("[data-lines]").forEach(attach);
