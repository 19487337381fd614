"use strict";
// Pictures are drawn in tokens: one unit of a picture's coordinates is one token.
const SVG = "http://www.w3.org/2000/svg";
const LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-";

// Each token as [step, percent], null = kept: from "step:percent step:percent - …".
function tokensOf(picture) {
  return picture.dataset.tokens.split(" ").map(t => t === "-" ? null : t.split(":").map(Number));
}

// For each step {place: percent} of the tokens that were masked then, from the letters of a trace.
function traceOf(stage, tokens) {
  if (!stage.dataset.trace) return [];
  return stage.dataset.trace.split(" ").map((letters, step) => {
    const masked = tokens.map((t, i) => t && t[0] >= step ? i : -1).filter(i => i >= 0);
    return Object.fromEntries(masked.map((place, i) => [place, Math.round(LEVELS.indexOf(letters[i]) / 0.63)]));
  });
}

function stepColour(share) {
  const ramp = [[253, 231, 37], [53, 183, 121], [49, 104, 142], [68, 1, 84]];
  const at = Math.min(share * 3, 2.999), low = Math.floor(at), part = at - low;
  return `rgb(${ramp[low].map((c, i) => Math.round(c + (ramp[low + 1][i] - c) * part)).join(" ")})`;
}

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function label(layer, x, y, text) {
  element("text", {x: x + 0.5, y: y + 0.67, fill: "#fff", stroke: "#000", "stroke-width": 0.1, "paint-order": "stroke",
    "font-size": 0.46, "font-weight": 700, "text-anchor": "middle"}, layer, text);
}

// Paints a picture after `done` denoising steps: still masked tokens, and what is known of the others.
// done: undefined = all of them; negative = the picture before, without any paint.
function paint(picture, kind, done = Infinity) {
  picture.querySelector(".overlay")?.remove();
  if (done < 0 || (kind === "edit" && done === Infinity)) return;
  const columns = Number(picture.dataset.columns), tokens = tokensOf(picture);
  const last = Math.max(1, ...tokens.filter(Boolean).map(t => t[0]));
  const shown = kind === "probability" ? traceOf(picture, tokens)[done] ?? {} : {};
  const layer = element("g", {class: "overlay"}, picture), numbers = columns <= 16;
  tokens.forEach((token, i) => {
    if (!token) return;
    const [step, percent] = token, x = i % columns, y = Math.floor(i / columns), masked = step >= done;
    const cell = {x, y, width: 1, height: 1};
    if (masked) element("rect", {...cell, class: "masked", fill: "url(#masked)"}, layer);
    if (kind === "step" && !masked) {
      element("rect", {...cell, fill: stepColour(step / last), "fill-opacity": 0.72}, layer);
      if (numbers) label(layer, x, y, step + 1);
    }
    const probability = masked ? shown[i] : percent;
    if (kind === "probability" && probability !== undefined) {
      element("rect", {...cell, fill: "#d4145a", "fill-opacity": 0.08 + 0.87 * (1 - probability / 100)}, layer);
      if (numbers && probability < 100) label(layer, x, y, probability);
    }
  });
  const edges = picture.querySelector(".edit");
  if (edges) picture.append(edges); // on top
}

// One scrubber moves all pictures of its box. Position 0: the picture before; 1: masked; 1 + k: after k steps.
class Scrubber {
  constructor(box) {
    this.box = box;
    this.stages = [...box.querySelectorAll(".stage")];
    this.slider = box.querySelector("input[type=range]");
    this.button = box.querySelector(".play");
    this.output = box.querySelector("output");
    this.slider.addEventListener("input", () => { this.stop(); this.show(); });
    this.button.addEventListener("click", () => this.timer ? this.stop() : this.play());
    this.show();
  }
  get at() { return Number(this.slider.value); }
  get end() { return Number(this.slider.max); }
  move(by) { this.stop(); this.slider.value = this.at + by; this.show(); }
  play() {
    if (this.at >= this.end) this.slider.value = 0;
    this.button.textContent = "❚❚ stop";
    this.timer = setInterval(() => {
      this.slider.value = this.at + 1;
      this.show();
      if (this.at >= this.end) this.stop();
    }, this.end > 6 ? 350 : 700);
    this.show();
  }
  stop() {
    clearInterval(this.timer);
    this.timer = undefined;
    this.button.textContent = "▶ play";
  }
  show() {
    const kind = document.body.dataset.overlay;
    for (const stage of this.stages) {
      const before = stage.querySelector(".before"), done = before ? this.at - 1 : Math.max(this.at - 1, 0);
      if (before) before.style.display = done < 0 ? "" : "none";
      stage.querySelector(".after").style.display = done < 0 ? "none" : "";
      paint(stage, kind, done);
    }
    const words = this.words();
    this.slider.setAttribute("aria-valuetext", words);
    this.output.textContent = words;
  }
  words() {
    if (this.at === 0 && this.stages.some(s => s.querySelector(".before"))) return "the picture before";
    const done = Math.max(this.at - 1, 0), many = this.stages.length > 1;
    const sampled = this.stages.map(s => tokensOf(s).filter(Boolean)).flat();
    const masked = sampled.filter(t => t[0] >= done).length, now = sampled.filter(t => t[0] === done - 1).length;
    if (!sampled.length) return "no token was masked";
    if (done === 0) return `masked: ${masked} token${masked === 1 ? "" : "s"}${many ? " in all" : ""}`;
    return `after step ${done} of ${this.end - 1}: ${now} set, ${masked} still masked`;
  }
}

const scrubbers = new Map([...document.querySelectorAll("[data-scrub]")].map(box => [box, new Scrubber(box)]));
let current = [...scrubbers.values()].find(s => !s.box.hidden);

function repaint() {
  const kind = document.body.dataset.overlay;
  document.querySelectorAll(".picture[data-tokens]:not(.stage)").forEach(picture => paint(picture, kind));
  scrubbers.forEach(scrubber => scrubber.show());
}

document.getElementById("overlay")?.addEventListener("change", event => {
  document.body.dataset.overlay = event.target.value;
  repaint();
});

// A picture in the strip opens its edit below.
function pick(button) {
  const panel = document.getElementById(button.getAttribute("aria-controls")), rollout = button.closest(".rollout");
  rollout.querySelectorAll(".edit-panel").forEach(other => { other.hidden = other !== panel; });
  rollout.querySelectorAll(".pick").forEach(other => other.setAttribute("aria-pressed", other === button));
  panel.closest("details").open = true;
  current = scrubbers.get(panel);
  panel.scrollIntoView({block: "nearest"});
}
document.querySelectorAll(".pick").forEach(button => button.addEventListener("click", () => pick(button)));

// To the first failure below the one that was shown last, or the first of all; without a script the link does that.
let failure;
document.getElementById("next-failure")?.addEventListener("click", event => {
  const all = [...document.querySelectorAll("[data-failure]")];
  failure = all[(all.indexOf(failure) + 1) % all.length];
  failure.scrollIntoView();
  event.preventDefault();
});

// ---------------------------------------------------------------- tips

// What a title says, where hover, touch and keyboard reach it alike. Cells of a picture say theirs from its data.
const tip = document.getElementById("tip");
let tipped;
for (const holder of document.querySelectorAll("[title]")) {
  holder.dataset.tip = holder.title;
  holder.removeAttribute("title");
}

function showTip(target, text, place) {
  if (tipped !== target) hideTip();
  tipped = target;
  tip.textContent = text;
  tip.hidden = false;
  target.setAttribute("aria-describedby", "tip");
  const width = document.documentElement.clientWidth, middle = place.left + place.width / 2 - tip.offsetWidth / 2;
  const above = place.top - tip.offsetHeight - 7, hidden = document.querySelector(".bar")?.getBoundingClientRect().bottom ?? 0;
  tip.style.left = `${Math.max(6, Math.min(middle, width - tip.offsetWidth - 6)) + scrollX}px`;
  tip.style.top = `${(above < Math.max(hidden, 0) ? place.bottom + 7 : above) + scrollY}px`;
}
function hideTip() {
  tip.hidden = true;
  tip.style.left = tip.style.top = "0";
  tipped?.removeAttribute("aria-describedby");
  tipped = undefined;
}

// The cell of a picture under the pointer: what is known of its token.
function cellTip(picture, event) {
  const box = picture.getBoundingClientRect(), [, , columns, rows] = picture.getAttribute("viewBox").split(" ").map(Number);
  const x = Math.min(Math.floor((event.clientX - box.left) / box.width * columns), columns - 1);
  const y = Math.min(Math.floor((event.clientY - box.top) / box.height * rows), rows - 1);
  const token = tokensOf(picture)[y * columns + x], width = box.width / columns, height = box.height / rows;
  const known = token ? `set in step ${token[0] + 1}, probability ${(token[1] / 100).toFixed(2)}` : "kept";
  const left = box.left + x * width, top = box.top + y * height;
  showTip(picture, `row ${y}, column ${x}: ${known}`, {left, top, width, bottom: top + height});
}

function pointAt(event) {
  const target = event.target.closest?.("[data-tip], .picture[data-tokens]");
  if (!target) return hideTip();
  if (target.dataset.tip) showTip(target, target.dataset.tip, target.getBoundingClientRect());
  else cellTip(target, event);
}
document.addEventListener("pointermove", event => { if (event.pointerType === "mouse") pointAt(event); });
document.documentElement.addEventListener("pointerleave", hideTip);
document.addEventListener("click", pointAt);
document.addEventListener("focusin", event => {
  const target = event.target.closest("[data-tip]");
  if (target?.matches(":focus-visible")) showTip(target, target.dataset.tip, target.getBoundingClientRect());
});
document.addEventListener("focusout", hideTip);

// One stop of the Tab key for each text; inside it the arrow keys go from word to word.
document.querySelectorAll(".words").forEach(text => {
  const words = [...text.querySelectorAll(".token[data-tip]")];
  words.forEach((word, i) => { word.tabIndex = i ? -1 : 0; });
  text.addEventListener("keydown", event => {
    const at = words.indexOf(event.target), last = words.length - 1;
    const to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last}[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    words[Math.max(0, Math.min(to, last))].focus();
  });
});

// Arrow keys step and space plays, in the box that was last used.
document.addEventListener("focusin", event => {
  const box = event.target.closest?.("[data-scrub]");
  if (box) current = scrubbers.get(box);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") hideTip();
  if (event.ctrlKey || event.metaKey || event.altKey || !current) return;
  if (event.target.closest("input, select, textarea")) return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) { current.move(by); event.preventDefault(); }
  if (event.key === " " && !event.target.closest("button, summary, a, [data-tip]")) {
    if (current.timer) current.stop(); else current.play();
    event.preventDefault();
  }
});
