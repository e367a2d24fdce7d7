"use strict";
/* The page of the server: draw, drop, type or write an input, send it to /explain, show probabilities and heat map. */

const LINE = 0.2; // width of a drawn line, as a share of the height of the drawing: that of the digits' pens
const OVERSAMPLING = 8; // a drawn picture is averaged from this many times its pixels per side
const MAX_BARS = 10;
const MAX_FEATURES = 8;
const FOR = [255, 140, 0]; // orange: what speaks for the label
const AGAINST = [40, 150, 255]; // blue: what speaks against it

const $ = (id) => document.getElementById(id);
const pad = $("pad");
let spec; // what the network takes, from /info
let strokes = []; // of a drawing: lists of points in pixels of the pad
let file = null; // a picture that was chosen instead of drawn

const isText = () => spec.inputs?.[0].kind === "tokens";
const canDraw = () => spec.shape.length === 3 && spec.shape[0] === 1;

async function start() {
  const info = await (await fetch("/info")).json();
  spec = info.data;
  $("title").textContent = `Try ${spec.name}`;
  const names = isText() ? spec.targets[0].names : spec.class_names;
  const classes = names.length ? `${names.length} classes` : "a number";
  const shape = isText() ? "a text" : spec.shape.join(" × ");
  $("about").textContent = `Input ${shape}, output ${classes}. Network: ${info.name}.`;
  if (isText()) {
    $("written").hidden = false;
    $("limit").textContent = `The network reads the first ${Object.values(spec.longest)[0]} ${spec.inputs[0].cut}.`;
  } else if (spec.shape.length === 1) {
    $("numbers").hidden = false;
    spec.mean.forEach(addNumber);
  } else if ([1, 3].includes(spec.shape[0])) {
    $("picture").hidden = false;
    $("hint").textContent = canDraw() ? "Draw with mouse or finger, or drop an image here." : "Drop an image here.";
    clear();
  } else {
    show(`This network takes arrays of shape ${spec.shape.join(" × ")}: send them to /predict.`);
    $("predict").disabled = true;
  }
}

function addNumber(mean, place) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  label.textContent = `feature ${place + 1}`;
  Object.assign(field, { type: "number", step: "any", required: true, value: Number((mean * spec.scale).toPrecision(4)) });
  label.append(field);
  $("numbers").append(label);
}

function clear() {
  strokes = [];
  file = null;
  $("file").value = "";
  const side = Math.max(spec.shape[1], spec.shape[2]);
  pad.width = Math.round((320 * spec.shape[2]) / side);
  pad.height = Math.round((320 * spec.shape[1]) / side);
}

function pointOf(event) {
  const box = pad.getBoundingClientRect();
  return [((event.clientX - box.left) * pad.width) / box.width, ((event.clientY - box.top) * pad.height) / box.height];
}

function trace(context, lines, width) {
  Object.assign(context, { lineWidth: width, lineCap: "round", lineJoin: "round", strokeStyle: "white" });
  for (const line of lines) {
    context.beginPath();
    context.moveTo(...line[0]);
    line.forEach((point) => context.lineTo(...point));
    context.stroke();
  }
}

pad.addEventListener("pointerdown", (event) => {
  if (!canDraw()) return;
  if (file) clear();
  pad.setPointerCapture(event.pointerId);
  strokes.push([pointOf(event)]);
  trace(pad.getContext("2d"), strokes.slice(-1), LINE * 0.6 * pad.height);
});

pad.addEventListener("pointermove", (event) => {
  if (!pad.hasPointerCapture(event.pointerId)) return;
  strokes.at(-1).push(pointOf(event));
  trace(pad.getContext("2d"), [strokes.at(-1).slice(-2)], LINE * 0.6 * pad.height);
});

/* The drawing in the middle of a picture of the network's size, as large as it fits, with lines of one width. */
async function drawingAsPng() {
  const [, height, width] = spec.shape;
  const points = strokes.flat();
  const xs = points.map((point) => point[0]);
  const ys = points.map((point) => point[1]);
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const line = LINE * height;
  const scale = Math.min((width - line) / Math.max(right - left, 1), (height - line) / Math.max(bottom - top, 1));
  const place = ([x, y]) => [
    OVERSAMPLING * (width / 2 + scale * (x - (left + right) / 2)),
    OVERSAMPLING * (height / 2 + scale * (y - (top + bottom) / 2)),
  ];
  const large = new OffscreenCanvas(width * OVERSAMPLING, height * OVERSAMPLING);
  const context = large.getContext("2d", { willReadFrequently: true });
  trace(context, strokes.map((each) => each.map(place)), OVERSAMPLING * line);
  const ink = context.getImageData(0, 0, large.width, large.height).data;
  const sums = new Float64Array(width * height);
  for (let y = 0; y < large.height; y++) {
    for (let x = 0; x < large.width; x++) {
      sums[Math.floor(y / OVERSAMPLING) * width + Math.floor(x / OVERSAMPLING)] += ink[4 * (y * large.width + x) + 3];
    }
  }
  const pixels = new ImageData(width, height);
  sums.forEach((sum, at) => pixels.data.set([...Array(3).fill(sum / OVERSAMPLING ** 2), 255], 4 * at));
  const small = new OffscreenCanvas(width, height);
  small.getContext("2d").putImageData(pixels, 0, 0);
  return small.convertToBlob({ type: "image/png" });
}

async function choose(chosen) {
  clear();
  file = chosen;
  try {
    const image = await createImageBitmap(chosen);
    const scale = Math.max(pad.width / image.width, pad.height / image.height); // as the server does: the middle
    const [width, height] = [scale * image.width, scale * image.height];
    pad.getContext("2d").drawImage(image, (pad.width - width) / 2, (pad.height - height) / 2, width, height);
  } catch {
    show("This file is no image that the browser can show.");
  }
}

$("file").addEventListener("change", () => $("file").files.length && choose($("file").files[0]));
$("clear").addEventListener("click", clear);
pad.addEventListener("dragover", (event) => {
  event.preventDefault();
  pad.classList.add("dropping");
});
pad.addEventListener("dragleave", () => pad.classList.remove("dropping"));
pad.addEventListener("drop", (event) => {
  event.preventDefault();
  pad.classList.remove("dropping");
  if (event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
});

async function request() {
  if (isText()) {
    if (!$("text").value.trim()) throw new Error("Write a text first.");
    return { type: "application/json", body: JSON.stringify({ inputs: [$("text").value] }) };
  }
  if (!$("numbers").hidden) {
    const values = [...$("numbers").querySelectorAll("input")].map((field) => field.valueAsNumber);
    return { type: "application/json", body: JSON.stringify({ inputs: [values] }) };
  }
  if (file) return { type: file.type, body: file };
  if (!strokes.length) throw new Error(canDraw() ? "Draw something first, or choose an image." : "Choose an image first.");
  return { type: "image/png", body: await drawingAsPng() };
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  show("");
  $("predict").disabled = true;
  try {
    const { type, body } = await request();
    const answer = await fetch("/explain", { method: "POST", headers: { "content-type": type }, body });
    const content = await answer.json();
    if (!answer.ok) throw new Error(content.error);
    await present(content);
  } catch (error) {
    show(error.message);
  } finally {
    $("predict").disabled = false;
  }
});

function show(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

async function present({ prediction, heat_map: heat, image, ...text }) {
  const strong = document.createElement("strong");
  const isNumber = prediction.label === undefined;
  strong.textContent = isNumber ? prediction.value.toPrecision(5) : prediction.label;
  strong.id = "label";
  $("answer").replaceChildren(strong, isNumber ? "" : ` with probability ${percent(prediction.probability)}`);
  const ranked = Object.entries(prediction.probabilities ?? {});
  if (ranked.length > MAX_BARS) ranked.sort((one, other) => other[1] - one[1]).splice(MAX_BARS);
  $("bars").replaceChildren(...ranked.map(([name, share]) => bar(name, share, percent(share), false)));

  const most = Math.max(...heat.flat().map(Math.abs));
  const of = isNumber ? "the value" : `the probability of ${prediction.label}`;
  const amount = most < 0.0005 ? most.toExponential(1) : most.toPrecision(2);
  $("why").hidden = false;
  $("heat").hidden = !image;
  $("features").replaceChildren();
  if (isText()) {
    colour(text.tokens, heat, most);
    const rest = text.num_not_covered ? ` Only the first ${heat.length} were covered.` : "";
    const cut = text.is_cut_off ? " What follows was cut off." : "";
    $("caption").textContent =
      `Orange: without it ${of} falls, by up to ${amount}. Blue: without it ${of} rises.${rest}${cut}`;
  } else if (image) {
    await paint(heat, most, image);
    $("caption").textContent =
      `What the network saw. Orange: covering it lowers ${of}, by up to ${amount}. Blue: covering it raises it.`;
  } else {
    const features = heat.flat().map((drop, place) => [`feature ${place + 1}`, drop]);
    features.sort((one, other) => Math.abs(other[1]) - Math.abs(one[1])).splice(MAX_FEATURES);
    $("features").replaceChildren(
      ...features.map(([name, drop]) => bar(name, Math.abs(drop) / (most || 1), drop.toPrecision(2), drop < 0)),
    );
    $("caption").textContent = `How far ${of} falls when a feature takes its mean; the largest ${MAX_FEATURES}.`;
  }
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function bar(name, share, text, isAgainst) {
  const item = document.createElement("li");
  const [label, track, fill, number] = ["span", "div", "div", "span"].map((tag) => document.createElement(tag));
  label.textContent = name;
  track.className = "track";
  fill.className = isAgainst ? "fill against" : "fill";
  fill.style.width = `${100 * share}%`;
  number.className = "number";
  number.textContent = text;
  track.append(fill);
  item.append(label, track, number);
  return item;
}

/* Tokens in the colours of what they speak for; words and bytes apart, characters together. */
function colour(tokens, heat, most) {
  const spans = tokens.map((token, at) => {
    const span = document.createElement("span");
    const share = most ? (0.6 * Math.abs(heat[at])) / most : 0;
    span.textContent = token;
    span.title = heat[at].toPrecision(2);
    span.style.backgroundColor = `rgba(${(heat[at] >= 0 ? FOR : AGAINST).join(", ")}, ${share})`;
    return span;
  });
  const between = spec.inputs[0].cut === "characters" ? "" : " ";
  $("words").replaceChildren(...spans.flatMap((span) => [span, between]));
}

/* The input in grey with the heat map over it; the canvas has one pixel per pixel of the input. */
async function paint(heat, most, png) {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  const canvas = $("heat");
  [canvas.width, canvas.height] = [image.width, image.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, image.width, image.height);
  heat.flat().forEach((drop, at) => {
    const share = most ? (0.85 * Math.abs(drop)) / most : 0;
    const colour = drop >= 0 ? FOR : AGAINST;
    for (let part = 0; part < 3; part++) {
      pixels.data[4 * at + part] = (1 - share) * 0.7 * pixels.data[4 * at + part] + share * colour[part];
    }
  });
  context.putImageData(pixels, 0, 0);
}

start().catch((error) => show(`The server does not answer: ${error.message}`));
