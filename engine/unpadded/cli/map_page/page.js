"use strict";

const at = (id) => document.getElementById(id);
const data = JSON.parse(at("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const grid = new Uint16Array(bytes(data.places).buffer); // x, y of each point
const count = data.ids.length;
const codes = data.color ? bytes(data.color.codes) : new Uint8Array(count);
const canvas = at("map");

const REACH = 12; // pixels from the pointer to the point it means
const CELLS = 128; // of the index, along each side
const OF_CATEGORIES = [
  ["#2f6fde", "#6ea8ff"], ["#e0701a", "#ffa14f"], ["#1f9d61", "#4fd08f"], ["#c2379b", "#f07ccf"],
  ["#b58a00", "#f2c744"], ["#d63a3a", "#ff7d78"], ["#0f93a8", "#48cbe0"], ["#7a4fd0", "#b296ff"],
  ["#8a5a33", "#d0a177"], ["#6a8f1a", "#b3d84e"], ["#e0567f", "#ffa3bd"], ["#4a5568", "#c3cad6"],
];
const OF_THE_REST = ["#a3a8b0", "#666c76"];
const RAMP = [[59, 91, 219], [156, 54, 181], [224, 49, 92], [240, 120, 30], [245, 180, 30]];
const STEPS = 64; // of RAMP, as the codes of numbers count them

// Colors: [red, green, blue] of every code.

const dark = matchMedia("(prefers-color-scheme: dark)");
const parsed = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
const css = (color) => `rgb(${color.join(" ")})`;

function onRamp(share) {
  const place = Math.min(share * (RAMP.length - 1), RAMP.length - 1.001);
  const [from, to] = [RAMP[Math.floor(place)], RAMP[Math.floor(place) + 1]];
  return from.map((value, i) => Math.round(value + (to[i] - value) * (place % 1)));
}

function palette() {
  const scheme = dark.matches ? 1 : 0;
  if (data.color && !data.color.counts) {
    const steps = Array.from({ length: STEPS }, (_, step) => onRamp(step / (STEPS - 1)));
    return data.color.rest ? [...steps, parsed(OF_THE_REST[scheme])] : steps;
  }
  const own = data.color ? data.color.labels.length - data.color.rest : 1;
  const rest = Array(data.color ? data.color.rest : 0).fill(OF_THE_REST);
  return [...OF_CATEGORIES.slice(0, own), ...rest].map((pair) => parsed(pair[scheme]));
}
let colors = palette();

// The view: a point at x, y of the grid, both from 0 to 1, lies at left + x * scale, top - y * scale.

const view = { left: 0, top: 0, scale: 1, whole: 1 };

function place(i) {
  return [view.left + (grid[2 * i] / 65535) * view.scale, view.top - (grid[2 * i + 1] / 65535) * view.scale];
}

function fit(points) {
  let [left, right, low, high] = [1, 0, 1, 0];
  for (const i of points) {
    const [x, y] = [grid[2 * i] / 65535, grid[2 * i + 1] / 65535];
    [left, right, low, high] = [Math.min(left, x), Math.max(right, x), Math.min(low, y), Math.max(high, y)];
  }
  const panel = at("panel"); // lies over the map
  const [beside, above] = innerWidth > 600 ? [panel.offsetWidth + 16, 0] : [0, panel.offsetHeight + 16];
  const [width, height] = [innerWidth - beside, innerHeight - above];
  const span = (from, to) => Math.max(to - from, 0.05); // of one point, too
  view.scale = Math.min((width - 80) / span(left, right), (height - 80) / span(low, high));
  view.left = beside + width / 2 - ((left + right) / 2) * view.scale;
  view.top = above + height / 2 + ((low + high) / 2) * view.scale;
  redraw();
}

function showAll() {
  fit(everyPoint());
  view.whole = view.scale;
}

function* everyPoint() {
  for (let i = 0; i < count; i++) yield i;
}

function zoomAt(x, y, factor) {
  const scale = Math.min(Math.max(view.scale * factor, view.whole / 2), view.whole * 400);
  view.left = x - ((x - view.left) * scale) / view.scale;
  view.top = y - ((y - view.top) * scale) / view.scale;
  view.scale = scale;
  redraw();
}

function move(x, y) {
  view.left += x;
  view.top += y;
  redraw();
}

// Drawing: WebGL where there is any, else squares on a plain canvas.

let active = null; // of each point 1 or 0: found by the search and of a chosen category; null: all are
let behind = 0; // points that are not active
const order = new Uint32Array(count); // those first, then those without a color of their own, the others on top
const shades = new Uint8Array(4 * count); // red, green, blue, opacity of each point

const radius = () =>
  Math.min(Math.max(130 / Math.sqrt(count), 1.4), 5) * Math.min((view.scale / view.whole) ** 0.4, 3);
const enlarged = () => (active ? 1.35 : 1); // of the active points

function shade() {
  const opacity = active ? 240 : count > 20000 ? 150 : 215;
  const own = colors.length - (data.color ? data.color.rest : 0);
  const level = (i) => (active && !active[i] ? 0 : codes[i] < own ? 2 : 1);
  for (let [now, next] = [0, 0]; now < 3; now++) {
    for (let i = 0; i < count; i++) if (level(i) === now) order[next++] = i;
    if (now === 0) behind = next;
  }
  for (let i = 0; i < count; i++) {
    shades.set(colors[codes[i]], 4 * i);
    shades[4 * i + 3] = level(i) ? opacity : 32;
  }
  draw.load();
  redraw();
}

function webgl(gl) {
  const shader = (kind, source) => {
    const compiled = gl.createShader(kind);
    gl.shaderSource(compiled, source);
    gl.compileShader(compiled);
    gl.attachShader(program, compiled);
  };
  const program = gl.createProgram();
  shader(gl.VERTEX_SHADER, `
    attribute vec2 place; attribute vec4 shade;
    uniform vec2 start, step; uniform float size; varying vec4 color;
    void main() { gl_Position = vec4(start + place * step, 0, 1); gl_PointSize = size; color = shade; }`);
  shader(gl.FRAGMENT_SHADER, `
    precision highp float; // as in the vertex shader, or size would be two uniforms
    uniform float size; varying vec4 color;
    void main() {
      float inside = clamp((0.5 - distance(gl_PointCoord, vec2(0.5))) * size, 0.0, 1.0);
      gl_FragColor = vec4(color.rgb, 1) * color.a * inside;
    }`);
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  const attribute = (name, size, kind, buffer) => {
    const index = gl.getAttribLocation(program, name);
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.enableVertexAttribArray(index);
    gl.vertexAttribPointer(index, size, kind, true, 0, 0);
  };
  const [places, tints, indices] = [gl.createBuffer(), gl.createBuffer(), gl.createBuffer()];
  attribute("place", 2, gl.UNSIGNED_SHORT, places);
  gl.bufferData(gl.ARRAY_BUFFER, grid, gl.STATIC_DRAW);
  attribute("shade", 4, gl.UNSIGNED_BYTE, tints);
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, indices);
  const uniform = (name) => gl.getUniformLocation(program, name);
  const [start, step, size] = [uniform("start"), uniform("step"), uniform("size")];
  return {
    load() {
      gl.bufferData(gl.ARRAY_BUFFER, shades, gl.DYNAMIC_DRAW);
      gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
    },
    frame(ratio) {
      gl.viewport(0, 0, canvas.width, canvas.height);
      gl.clear(gl.COLOR_BUFFER_BIT);
      gl.uniform2f(start, (2 * view.left) / innerWidth - 1, 1 - (2 * view.top) / innerHeight);
      gl.uniform2f(step, (2 * view.scale) / innerWidth, (2 * view.scale) / innerHeight);
      gl.uniform1f(size, 2 * radius() * ratio);
      gl.drawElements(gl.POINTS, behind, gl.UNSIGNED_INT, 0);
      gl.uniform1f(size, 2 * radius() * ratio * enlarged());
      gl.drawElements(gl.POINTS, count - behind, gl.UNSIGNED_INT, 4 * behind);
    },
  };
}

function plain(context) {
  return {
    load() {},
    frame(ratio) {
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, innerWidth, innerHeight);
      for (const [rank, i] of order.entries()) {
        const side = radius() * 1.8 * (rank < behind ? 1 : enlarged());
        const [x, y] = place(i);
        if (x < -side || y < -side || x > innerWidth + side || y > innerHeight + side) continue;
        context.globalAlpha = shades[4 * i + 3] / 255;
        context.fillStyle = fills[codes[i]];
        context.fillRect(x - side / 2, y - side / 2, side, side);
      }
    },
  };
}
let fills = colors.map(css);
const gl = canvas.getContext("webgl2", { antialias: false });
const draw = gl ? webgl(gl) : plain(canvas.getContext("2d"));

let asked = 0;
function redraw() {
  asked ||= requestAnimationFrame(() => {
    asked = 0;
    draw.frame(devicePixelRatio);
    pointOut();
  });
}

function resize() {
  canvas.width = Math.round(innerWidth * devicePixelRatio);
  canvas.height = Math.round(innerHeight * devicePixelRatio);
  redraw();
}

// The point under the pointer: cells of the grid, each with its points.

const cellOf = (i) => (grid[2 * i] >> 9) * CELLS + (grid[2 * i + 1] >> 9);
const ends = new Uint32Array(CELLS * CELLS + 1);
const byCell = new Uint32Array(count);
for (let i = 0; i < count; i++) ends[cellOf(i) + 1]++;
for (let cell = 0; cell < CELLS * CELLS; cell++) ends[cell + 1] += ends[cell];
const filled = ends.slice();
for (let i = 0; i < count; i++) byCell[filled[cellOf(i)]++] = i;

function pointAt(x, y) {
  const cell = (value) => Math.min(Math.max(Math.floor(value * CELLS), 0), CELLS - 1);
  const along = (value) => [cell((value - REACH) / view.scale), cell((value + REACH) / view.scale)];
  const [left, right] = along(x - view.left);
  const [low, high] = along(view.top - y);
  let [nearest, least] = [-1, REACH * REACH];
  for (let column = left; column <= right; column++) {
    for (let k = ends[column * CELLS + low]; k < ends[column * CELLS + high + 1]; k++) {
      const i = byCell[k];
      if (active && !active[i]) continue;
      const [px, py] = place(i);
      const far = (px - x) ** 2 + (py - y) ** 2;
      if (far < least) [nearest, least] = [i, far];
    }
  }
  return nearest;
}

let pointed = -1;
let pinned = false;
let query = "";

function point(i, pin = false) {
  pinned = pin && i >= 0;
  at("tip").classList.toggle("pinned", pinned);
  canvas.classList.toggle("over", i >= 0);
  if (i !== pointed) {
    pointed = i;
    if (i >= 0) describe(i);
  }
  pointOut();
}

function describe(i) {
  at("name").textContent = data.ids[i];
  at("value").replaceChildren();
  if (data.color) at("value").append(swatch(codes[i]), data.color.shown[i]);
  at("text").replaceChildren(...(data.texts ? marked(data.texts[i]) : []));
  at("text").hidden = !data.texts;
}

function marked(text) {
  const start = query ? text.toLowerCase().indexOf(query) : -1;
  if (start < 0) return [text];
  const found = document.createElement("mark");
  found.textContent = text.slice(start, start + query.length);
  return [text.slice(0, start), found, ...marked(text.slice(start + query.length))];
}

function pointOut() {
  at("tip").hidden = at("ring").hidden = pointed < 0;
  if (pointed < 0) return;
  const [x, y] = place(pointed);
  const tip = at("tip");
  const [left, top] = [x + 16, y + 16];
  const put = (element, x, y) => Object.assign(element.style, { left: `${x}px`, top: `${y}px` });
  put(at("ring"), x, y);
  put(
    tip,
    left + tip.offsetWidth > innerWidth - 8 ? Math.max(8, x - 16 - tip.offsetWidth) : left,
    top + tip.offsetHeight > innerHeight - 8 ? Math.max(8, y - 16 - tip.offsetHeight) : top,
  );
}

// Search and legend: which points are active.

const chosen = new Set(); // codes; none: all
let lowered = null;

function select() {
  lowered ??= data.ids.map((id, i) => `${id}\n${data.texts ? data.texts[i] : ""}`.toLowerCase());
  active = query || chosen.size ? new Uint8Array(count) : null;
  let found = 0;
  for (let i = 0; active && i < count; i++) {
    active[i] = (!chosen.size || chosen.has(codes[i])) && lowered[i].includes(query) ? 1 : 0;
    found += active[i];
  }
  at("found").textContent = active ? `${found.toLocaleString("en")} of ${count.toLocaleString("en")}` : "";
  point(-1);
  shade();
}

function swatch(code) {
  const dot = document.createElement("span");
  dot.className = "swatch";
  dot.style.background = css(colors[code]);
  return dot;
}

function choose(code) {
  if (!chosen.delete(code)) chosen.add(code);
  legend();
  select();
}

function legend() {
  if (!data.color) return;
  const part = (kind, name, ...content) => {
    const element = document.createElement(kind);
    element.className = name;
    element.append(...content);
    return element;
  };
  const rows = [part("h2", "", data.color.name)];
  if (data.color.counts) {
    for (const [code, label] of data.color.labels.entries()) {
      const number = data.color.counts[code].toLocaleString("en");
      const row = part("button", "", swatch(code), part("span", "label", label), part("span", "count", number));
      row.title = label;
      row.ariaPressed = chosen.has(code);
      row.onclick = () => choose(code);
      rows.push(row);
    }
  } else {
    const ramp = part("div", "ramp");
    ramp.style.background = `linear-gradient(90deg, ${RAMP.map(css).join(", ")})`;
    rows.push(ramp, part("div", "ends", ...data.color.labels.map((label) => part("span", "", label))));
  }
  at("legend").replaceChildren(...rows);
  at("legend").hidden = false;
  at("legend").classList.toggle("chosen", chosen.size > 0);
}

// What the reader does.

const touches = new Map(); // of each pointer that is down its last place
let travelled = 0;

canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  touches.set(event.pointerId, [event.clientX, event.clientY]);
  travelled = 0;
};

canvas.onpointermove = (event) => {
  const last = touches.get(event.pointerId);
  const here = [event.clientX, event.clientY];
  if (!last) {
    if (!pinned) point(pointAt(...here));
    return;
  }
  touches.set(event.pointerId, here);
  travelled += Math.hypot(here[0] - last[0], here[1] - last[1]);
  canvas.classList.toggle("moving", travelled > 4);
  if (touches.size === 1) move(here[0] - last[0], here[1] - last[1]);
  if (touches.size === 2) {
    const [other] = [...touches].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    const apart = (from) => Math.hypot(from[0] - other[0], from[1] - other[1]);
    zoomAt((here[0] + other[0]) / 2, (here[1] + other[1]) / 2, apart(here) / (apart(last) || 1));
  }
};

canvas.onpointerup = canvas.onpointercancel = (event) => {
  touches.delete(event.pointerId);
  canvas.classList.remove("moving");
  if (travelled <= 4 && event.type === "pointerup") point(pointAt(event.clientX, event.clientY), true);
};

canvas.onpointerleave = () => pinned || point(-1);
canvas.ondblclick = (event) => zoomAt(event.clientX, event.clientY, 2);
canvas.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    const pixels = event.deltaY * (event.deltaMode ? 16 : 1);
    zoomAt(event.clientX, event.clientY, Math.exp(-Math.max(-240, Math.min(240, pixels)) / 400));
  },
  { passive: false },
);

const KEYS = {
  "+": () => zoomAt(innerWidth / 2, innerHeight / 2, 1.5),
  "=": () => zoomAt(innerWidth / 2, innerHeight / 2, 1.5),
  "-": () => zoomAt(innerWidth / 2, innerHeight / 2, 1 / 1.5),
  0: showAll,
  ArrowLeft: () => move(80, 0),
  ArrowRight: () => move(-80, 0),
  ArrowUp: () => move(0, 80),
  ArrowDown: () => move(0, -80),
  "/": () => at("search").focus(),
  Escape: () => point(-1),
};
onkeydown = (event) => {
  if (event.target === at("search") || event.ctrlKey || event.metaKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
};
for (const button of at("zoom").children) button.onclick = () => KEYS[button.dataset.key]();

at("search").oninput = (event) => {
  query = event.target.value.trim().toLowerCase();
  select();
};
at("search").onkeydown = (event) => {
  if (event.key === "Escape") {
    event.target.value = query = "";
    event.target.blur();
    select();
  }
  const found = event.key === "Enter" ? [...everyPoint()].filter((i) => !active || active[i]) : [];
  if (found.length) fit(found);
};

dark.onchange = () => {
  colors = palette();
  fills = colors.map(css);
  legend();
  shade();
};
onresize = resize;
legend();
shade();
resize();
showAll();
