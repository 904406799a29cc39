"use strict";
const tips = JSON.parse(document.getElementById("tips").textContent);
const tip = document.getElementById("tip");
const parts = [...document.querySelectorAll("svg.front .mark, svg.front .bar, svg.front .cross")];
const rows = [...document.querySelectorAll("table.points tbody tr")];

function mark(key, on) {
  for (const element of [...parts, ...rows]) {
    if (element.dataset.key === key) element.classList.toggle("marked", on);
  }
}

function show(event) {
  const found = tips[event.currentTarget.dataset.key];
  tip.replaceChildren();
  const head = document.createElement("strong");
  head.textContent = found.title;
  tip.append(head, ...found.lines.flatMap((line) => [line, document.createElement("br")]));
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
  tip.style.top = Math.max(8, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
  mark(event.currentTarget.dataset.key, true);
}

for (const point of parts.filter((part) => part.classList.contains("mark"))) {
  point.addEventListener("mousemove", show);
  point.addEventListener("mouseleave", () => {
    tip.hidden = true;
    mark(point.dataset.key, false);
  });
  point.addEventListener("click", () => {
    const row = rows.find((candidate) => candidate.dataset.key === point.dataset.key);
    if (row) row.scrollIntoView({ block: "center" });
  });
}

const boxes = [...document.querySelectorAll("input[data-method]")];
const find = document.getElementById("find");

function filter() {
  const hidden = new Set(boxes.filter((box) => !box.checked).map((box) => box.dataset.method));
  const text = find.value.trim().toLowerCase();
  for (const part of parts) {
    part.classList.toggle("off", hidden.has(tips[part.dataset.key].method));
  }
  for (const row of rows) {
    const misses = text !== "" && !row.textContent.toLowerCase().includes(text);
    row.classList.toggle("off", misses || hidden.has(row.dataset.method));
  }
}

for (const box of boxes) box.addEventListener("change", filter);
find.addEventListener("input", filter);
