// Opens and closes layers, filters them, and shows facts. Without it the page is still a whole drawing.
"use strict";

const map = document.querySelector(".map");
const tip = document.getElementById("facts");
const search = document.getElementById("search");
const theme = document.getElementById("theme");
const { ribbon: outline, ...numbers } = map.dataset;
const size = Object.fromEntries(Object.entries(numbers).map(([key, value]) => [key, Number(value)]));
const every = (selector) => [...map.querySelectorAll(selector)];
const list = (element, key) => (element.dataset[key] ?? "0 0 0 0").split(" ").map(Number);
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

const rows = every(".rows > g").map((element, number) => {
  const heading = element.classList.contains("heading");
  const closed = element.getAttribute("aria-expanded") === "false";
  return {
    element, number, heading, closed,
    end: Number(element.dataset.end),
    level: Number(element.getAttribute("aria-level")),
    heights: list(element, "height"),
    solid: list(element, "solid"),
    guide: part(element, ".guide"),
    named: named(element),
    look: Number(closed), // 0 as an open row, 1 as a closed layer or as a stripe of one
    weights: [], ribbons: [], sum: null, looks: [element], shown: true,
  };
});
const inside = (row) => rows.slice(row.number + 1, row.end);
rows.filter((row) => row.closed).flatMap(inside).forEach((row) => { if (!row.heading) row.look = 1; });
const weights = every(".weight").map((element) => {
  const row = rows[element.dataset.row];
  const weight = { element, row, at: list(element, "at"), solid: list(element, "solid"), named: named(element), ribbons: [] };
  row.weights.push(weight);
  row.looks.push(element);
  return weight;
});
every(".sum").forEach((sum) => {
  const row = rows[sum.dataset.row];
  row.sum = sum;
  row.looks.push(sum);
});
rows.forEach((row) => { row.looks = row.looks.flatMap((element) => [...element.querySelectorAll("[data-look]")]); });
const byId = new Map([...rows, ...weights].map((item) => [item.element.id, item]));
const ribbons = every(".ribbon").map((element) => {
  const ribbon = {
    element, weight: byId.get("w" + element.dataset.weight), row: rows[element.dataset.row], part: list(element, "part"),
  };
  ribbon.weight.ribbons.push(ribbon);
  ribbon.row.ribbons.push(ribbon);
  return ribbon;
});
const legend = { looks: every(".legend [data-look], .column[data-look]"), look: 0 };

// Gives elements their other look: their attributes are exchanged for those that the drawing has noted beside them.
function wear(item, look) {
  if (item.look === look) return;
  item.look = look;
  for (const element of item.looks) {
    const other = element.dataset.look.split(";").map((pair) => pair.split("="));
    element.dataset.look = other.map(([name]) => `${name}=${element.getAttribute(name)}`).join(";");
    set(element, Object.fromEntries(other));
  }
}

// ---- where it is drawn: the drawing says how high everything is, open and closed; here it is added up

function draw() {
  const filtering = search.value.trim() !== "";
  const bottoms = [];
  let y = legend.look ? size.narrowTop : size.top;
  for (let number = 0; number < rows.length; bottoms[number] = y) {
    const row = rows[number];
    const closed = row.heading && row.closed && !filtering;
    number = closed ? row.end : number + 1;
    if (!row.shown) {
      place(row, y, "hidden");
      continue;
    }
    y += row.heading ? size.above : 0;
    place(row, y, closed ? "closed" : "open");
    if (closed) {
      let at = y + (row.heights[1] - Number(row.element.dataset.stack)) / 2;
      for (const inner of inside(row)) {
        place(inner, at, inner.heading ? "hidden" : "stripe");
        at += inner.heading ? 0 : inner.heights[1];
      }
    }
    y += row.heights[Number(closed)];
  }
  for (const row of rows.filter(({ guide }) => guide)) {
    set(row.guide, { height: row.how === "open" ? round(Math.max(bottoms[row.end] - row.y - size.heading + 4, 0)) : 0 });
  }
  ribbons.forEach(bend);
  set(map, { height: Math.ceil(y + size.below) });
  frame();
}

function place(row, y, how) {
  Object.assign(row, { y, how });
  const hidden = how === "hidden";
  if (!hidden) wear(row, Number(how !== "open"));
  hide(row.element, hidden);
  set(row.element, { transform: `translate(0,${round(y)})` });
  if (row.heading) set(row.element, { "aria-expanded": hidden ? !row.closed : how === "open" });
  if (row.sum) {
    hide(row.sum, hidden);
    set(row.sum, { transform: `translate(0,${round(y)})` });
  }
  for (const { element, at } of row.weights) {
    hide(element, hidden);
    set(element, { transform: `translate(0,${round(y + at[row.look])})` });
  }
}

const solid = ({ solid }, { y, look }) => [y + solid[2 * look], solid[2 * look + 1]];

function bend({ element, weight, row, part: [start, share] }) {
  const hidden = row.how === "hidden" || weight.row.how === "hidden";
  hide(element, hidden);
  if (hidden) return;
  const [a, thick] = solid(weight, weight.row);
  const [top, height] = solid(row, row);
  const ends = { a, b: a + thick, c: top + height * start, d: top + height * (start + share) };
  set(element, { d: outline.replaceAll(/\{(\w)\}/g, (_, end) => round(ends[end])) });
}

// ---- how wide it is: the columns move, the ribbons are stretched, nothing else changes

function fit() {
  const { paddingLeft, paddingRight } = getComputedStyle(map.parentElement);
  const room = map.parentElement.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight);
  const narrow = room < size.least;
  const width = Math.max(size.leastNarrow, Math.min(size.most, room));
  const [left, bar] = narrow ? [0, size.narrowBar] : [size.left, size.bar];
  const middle = width - left - bar - size.right;
  map.classList.toggle("is-narrow", narrow);
  set(map, { width });
  set(part(map, ".ribbons"), { transform: `translate(${left + bar},0)${middle === size.middle ? "" : ` scale(${middle / size.middle},1)`}` });
  set(part(map, ".left"), { transform: `translate(${left},0)` });
  set(part(map, ".right"), { transform: `translate(${width - size.right},0)` });
  const letters = Math.floor((middle - 12) / size.letter);
  for (const label of every(".expression")) {
    const { full } = label.dataset;
    label.textContent = full.length <= letters ? full : `${full.slice(0, letters - 1).trimEnd()}…`;
  }
  const turned = legend.look !== Number(narrow);
  wear(legend, Number(narrow));
  if (turned || rows[0].how === undefined) draw();
  else frame();
}

const frame = () => set(map, { viewBox: `0 0 ${map.getAttribute("width")} ${map.getAttribute("height")}` });

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

const stopsOf = [weights, rows.filter((row) => row.element.hasAttribute("role"))];
const canFocus = (item) => !["hidden", "stripe"].includes(item.how ?? item.row.how);

function stops() {
  for (const items of stopsOf) {
    const open = items.filter(canFocus);
    const now = open.find((item) => item.element.tabIndex === 0) ?? open[0];
    items.forEach((item) => set(item.element, { tabindex: item === now ? 0 : -1 }));
  }
}

function go(item) {
  if (!item) return;
  stopsOf.find((items) => items.includes(item)).forEach((other) => set(other.element, { tabindex: other === item ? 0 : -1 }));
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
  const items = stopsOf.find((each) => each.includes(item)).filter(canFocus);
  const at = items.indexOf(item);
  const steps = { ArrowDown: 1, ArrowUp: -1, Home: -items.length, End: items.length };
  const opened = item.heading && item.how === "open";
  if (event.key in steps) {
    go(items[Math.max(0, Math.min(items.length - 1, at + steps[event.key]))]);
  } else if (item.heading && ["Enter", " "].includes(event.key)) {
    toggle(item);
  } else if (event.key === "ArrowRight" && item.heading) {
    if (opened) go(items[at + 1]?.level > item.level ? items[at + 1] : null);
    else toggle(item, false);
  } else if (event.key === "ArrowLeft" && item.level) {
    if (opened && !search.value.trim()) toggle(item, true);
    else go(items.slice(0, at).findLast((other) => other.level < item.level));
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
const nameTheme = () => {
  theme.textContent = isDark() ? "Light" : "Dark";
  set(theme, { "aria-label": `${theme.textContent} theme` });
};
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
addEventListener("resize", fit);
nameTheme();
fit();
stops();
