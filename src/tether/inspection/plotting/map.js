// Opens and closes layers, filters them, and shows facts. Without it the page is still a whole drawing.
"use strict";

const map = document.querySelector(".map");
const tip = document.getElementById("facts");
const search = document.getElementById("search");
const theme = document.getElementById("theme");
const size = Object.fromEntries(Object.entries(map.dataset).map(([key, value]) => [key, Number(value)]));
const every = (selector) => [...map.querySelectorAll(selector)];
const pair = (element, key) => (element.dataset[key] ?? "0 0").split(" ").map(Number);
const round = (value) => Math.round(value * 100) / 100;
const set = (element, values) => Object.entries(values).forEach(([key, value]) => element.setAttribute(key, value));
const hide = (element, hidden) => (hidden ? set(element, { display: "none" }) : element.removeAttribute("display"));
const part = (element, selector) => element.querySelector(selector);

// ---- what is drawn

const facts = new Map();
every("title").forEach((title) => {
  facts.set(title.parentElement, title.textContent);
  set(title.parentElement, { "aria-label": title.textContent.replaceAll("\n", "; ") });
  title.remove(); // or the browser would show it too
});
const named = (element) => (facts.get(element) ?? "").split("\n")[0].toLowerCase();

const rows = every(".rows > g").map((element, number) => ({
  element, number,
  heading: element.classList.contains("heading"),
  closed: element.getAttribute("aria-expanded") === "false",
  end: Number(element.dataset.end),
  heights: pair(element, "height"),
  solids: pair(element, "solid"),
  named: named(element),
  weights: [], ribbons: [], sum: null, shown: true,
}));
const weights = every(".weight").map((element) => {
  const row = rows[element.dataset.row];
  const weight = { element, row, solids: pair(element, "solid"), named: named(element), ribbons: [] };
  row.weights.push(weight);
  return weight;
});
const byId = new Map([...rows, ...weights].map((item) => [item.element.id, item]));
const ribbons = every(".ribbon").map((element) => {
  const ribbon = {
    element, weight: byId.get("w" + element.dataset.weight), row: rows[element.dataset.row], part: pair(element, "part"),
  };
  ribbon.weight.ribbons.push(ribbon);
  ribbon.row.ribbons.push(ribbon);
  return ribbon;
});
every(".sum").forEach((sum) => { rows[sum.dataset.row].sum = sum; });
const inside = (row) => rows.slice(row.number + 1, row.end);

// ---- where it is drawn: what layout.py and drawing.py do, for the layers that are open and the window there is

function draw() {
  const width = Math.max(size.least, Math.min(size.most, map.parentElement.clientWidth - 48));
  const right = width - size.right;
  const letters = Math.floor((right - size.left - size.bar - 12) / size.letter);
  for (const label of every(".expression")) {
    const { full } = label.dataset;
    label.textContent = full.length <= letters ? full : `${full.slice(0, letters - 1).trimEnd()}…`;
  }
  const filtering = search.value.trim() !== "";
  let y = size.top;
  for (let number = 0; number < rows.length;) {
    const row = rows[number];
    const closed = row.heading && row.closed && !filtering;
    number = closed ? row.end : number + 1;
    if (!row.shown) {
      place(row, right, y, 0, "hidden");
      continue;
    }
    y += row.heading ? size.above : 0;
    const stack = closed ? inside(row).reduce((sum, inner) => sum + inner.heights[1], 0) : 0;
    const height = Math.max(row.heights[0], stack);
    place(row, right, y, height, closed ? "closed" : "open");
    if (closed) {
      let at = y + (height - stack) / 2;
      for (const inner of inside(row)) {
        place(inner, right, at, inner.heights[1], "stripe");
        at += inner.heights[1];
      }
    }
    y += height;
  }
  rows.filter((row) => row.heading && ["open", "closed"].includes(row.how)).forEach(span);
  ribbons.forEach((ribbon) => bend(ribbon, size.left + size.bar, right));
  const height = Math.ceil(y + size.below);
  set(map, { width, height, viewBox: `0 0 ${width} ${height}` });
  set(part(map, ".column.right"), { x: right });
}

function place(row, x, y, height, how) {
  Object.assign(row, { y, height, how });
  const { element, heading } = row;
  const stripe = how === "stripe";
  hide(element, how === "hidden" || (heading && stripe));
  set(element, { transform: `translate(${x},${round(y)})` });
  if (heading) {
    set(element, { "aria-expanded": how === "open" || (how !== "closed" && !row.closed) });
    return;
  }
  const bar = part(element, ".solid");
  if (bar) {
    row.thick = row.solids[Number(stripe)];
    row.top = y + (height - row.thick) / 2;
    set(part(element, ".hit"), { height: round(height) });
    set(bar, { y: round(row.top - y), height: round(row.thick) });
    hide(element.lastElementChild, stripe);
  }
  const boxes = row.weights.map(({ solids }) => (stripe ? solids[1] : Math.max(solids[0], size.line)));
  const gap = stripe ? 0 : size.gap;
  let at = y + (height - boxes.reduce((sum, box) => sum + box + gap, -gap)) / 2;
  row.weights.forEach((weight, index) => {
    const box = boxes[index];
    weight.thick = weight.solids[Number(stripe)];
    weight.top = at + (box - weight.thick) / 2;
    hide(weight.element, how === "hidden");
    set(weight.element, { transform: `translate(${size.left},${round(at)})` });
    set(part(weight.element, ".box"), { height: round(box), rx: stripe ? 0 : 2 });
    set(part(weight.element, ".solid"), { y: round(weight.top - at), height: round(weight.thick) });
    hide(weight.element.lastElementChild, stripe);
    at += box + gap;
  });
}

function span(row) {
  const { element, y, height } = row;
  const closed = row.how === "closed";
  const x = Number(element.dataset.x);
  const bottom = Math.max(...inside(row).filter((inner) => inner.shown).map((inner) => inner.y + inner.height), y + height);
  set(part(element, ".hit"), { height: round(height) });
  set(part(element, ".label"), { transform: `translate(0,${round(height / 2)})` });
  set(part(element, ".sign"), { d: closed ? `M${x + 2} -4.5l5 4.5l-5 4.5` : `M${x} -2.5l4.5 5l4.5 -5` });
  set(part(element, ".bracket"), {
    d: closed ? `M${x - 5} 0.5h3v${round(height - 1)}h-3` : `M${x + 4.5} ${size.heading - 4}V${round(bottom - y)}`,
  });
  if (row.sum) {
    hide(row.sum, !closed);
    set(row.sum, { y: round(y + height / 2) });
  }
}

function bend({ element, weight, row, part: [start, share] }, from, to) {
  const hidden = row.how === "hidden" || weight.row.how === "hidden";
  hide(element, hidden);
  if (hidden) return;
  const [y, end] = [round(weight.top), round(weight.top + weight.thick)];
  const [toY, toEnd] = [row.top + row.thick * start, row.top + row.thick * (start + share)].map(round);
  const middle = round((from + to) / 2);
  set(element, {
    d: `M${from} ${y}C${middle} ${y} ${middle} ${toY} ${to} ${toY}V${toEnd}C${middle} ${toEnd} ${middle} ${end} ${from} ${end}Z`,
  });
}

// ---- facts of what is under the pointer or has the focus

const itemOf = (target) => {
  const element = target.closest?.(".ribbon, .weight, .heading, .use");
  return element && (byId.get(element.id) ?? ribbons.find((ribbon) => ribbon.element === element));
};

function show(item, x, y) {
  const lit = item.weight ? [item] : item.heading ? inside(item).flatMap((row) => row.ribbons) : item.ribbons;
  map.classList.add("lit");
  for (const each of [item, ...lit, ...lit.map(({ weight }) => weight), ...lit.map(({ row }) => row)]) {
    each.element.classList.add("lit");
  }
  tip.textContent = facts.get((item.weight ? item.row : item).element);
  tip.hidden = false;
  const { offsetWidth, offsetHeight } = tip;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - offsetWidth - 8))}px`;
  tip.style.top = `${y + 18 + offsetHeight > innerHeight ? Math.max(4, y - offsetHeight - 12) : y + 18}px`;
}

function forget() {
  tip.hidden = true;
  map.classList.remove("lit");
  every(".lit").forEach((element) => element.classList.remove("lit"));
}

map.addEventListener("mousemove", (event) => {
  forget();
  const item = itemOf(event.target);
  if (item) show(item, event.clientX, event.clientY);
});
map.addEventListener("mouseleave", forget);
// Not on the drawing itself: Chromium lets the focus stop at an SVG element that listens to it.
map.parentElement.addEventListener("focusin", (event) => {
  forget();
  const item = itemOf(event.target);
  const { left, bottom } = event.target.getBoundingClientRect();
  if (item && event.target.matches(":focus-visible")) show(item, left, bottom - 12);
});
map.parentElement.addEventListener("focusout", forget);

// ---- the keyboard: one stop for the weights and one for the layers; arrows go on from there

const lists = [weights, rows.filter((row) => row.element.hasAttribute("role"))];
const canFocus = (item) => !["hidden", "stripe"].includes(item.how ?? item.row.how);

function stops() {
  for (const list of lists) {
    const open = list.filter(canFocus);
    const now = open.find((item) => item.element.tabIndex === 0) ?? open[0];
    list.forEach((item) => set(item.element, { tabindex: item === now ? 0 : -1 }));
  }
}

function go(item) {
  if (!item) return;
  lists.find((list) => list.includes(item)).forEach((other) => set(other.element, { tabindex: other === item ? 0 : -1 }));
  item.element.focus();
}

function toggle(row, closed) {
  row.closed = closed ?? !row.closed;
  forget();
  draw();
  stops();
}

map.addEventListener("click", (event) => {
  const item = itemOf(event.target);
  const row = item?.row ?? item;
  if (!row || search.value.trim()) return;
  // A click on a stripe means the closed layer that it is in.
  const heading = row.how === "stripe" ? rows.find((r) => r.how === "closed" && r.number < row.number && row.number < r.end) : row;
  if (heading.heading) toggle(heading);
});
map.addEventListener("keydown", (event) => {
  const item = byId.get(event.target.id);
  if (!item) return;
  const list = lists.find((each) => each.includes(item)).filter(canFocus);
  const steps = { ArrowDown: 1, ArrowUp: -1, Home: -list.length, End: list.length };
  if (event.key in steps) {
    const next = list.indexOf(item) + steps[event.key];
    go(list[Math.max(0, Math.min(list.length - 1, next))]);
  } else if (item.heading && ["Enter", " ", "ArrowLeft", "ArrowRight"].includes(event.key)) {
    toggle(item, { ArrowLeft: true, ArrowRight: false }[event.key]);
  } else if (event.key === "Escape") {
    forget();
  } else {
    return;
  }
  event.preventDefault();
});

// ---- the tools

function filter() {
  const words = search.value.trim().toLowerCase();
  const found = (item) => item.named.includes(words);
  const uses = rows.filter((row) => row.element.classList.contains("use"));
  // A use is shown with its weights, and a weight with all its uses: who else reads it is what a map is for.
  const hits = weights.filter((weight) => found(weight) || weight.ribbons.some(({ row }) => found(row)));
  rows.forEach((row) => { row.shown = words === ""; });
  uses.filter(found).forEach((row) => { row.shown = true; });
  for (const weight of hits) [weight, ...weight.ribbons].forEach(({ row }) => { row.shown = true; });
  rows.filter((row) => row.heading).forEach((row) => { row.shown ||= inside(row).some((inner) => inner.shown); });
  const shown = uses.filter((row) => row.shown).length;
  document.getElementById("found").textContent = words
    ? `${hits.length} of ${weights.length} weights, ${shown} of ${uses.length} uses`
    : "";
  draw();
  stops();
}

search.addEventListener("input", filter);
for (const [id, closed] of [["open", false], ["close", true]]) {
  document.getElementById(id).addEventListener("click", () => {
    rows.filter((row) => row.heading).forEach((row) => { row.closed = closed; });
    draw();
    stops();
  });
}
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
addEventListener("resize", draw);
nameTheme();
draw();
stops();
