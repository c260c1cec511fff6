// Plots, drawn from the data of the page. Squares are source models, other shapes methods; hollow is without AIM.
const NAMES = { base: "base", source: "fine-tuned model", merge: "merge without AIM", aim: "merge with AIM", variant: "control, or AIM in another form" };

function ticks(low, high, count) {
  const rough = (high - low) / count,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step)
    found.push(Number(value.toFixed(10)));
  return found;
}

/** A frame with axes: returns the drawing, and functions from values to places in it. */
function frame(width, height, xs, ys, labels, small) {
  const pad = small ? { l: 8, r: 8, t: 8, b: 8 } : { l: 46, r: 16, t: 14, b: 40 };
  const range = (values) => {
    const low = Math.min(...values),
      high = Math.max(...values),
      room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    return [low - room, high + room];
  };
  const [x0, x1] = range(xs),
    [y0, y1] = range(ys);
  const x = (v) => pad.l + ((v - x0) / (x1 - x0)) * (width - pad.l - pad.r);
  const y = (v) => height - pad.b - ((v - y0) / (y1 - y0)) * (height - pad.t - pad.b);
  const svg = make("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "plot",
    role: small ? "presentation" : "group",
    "aria-label": labels.title,
  });
  if (!small) {
    for (const v of ticks(x0, x1, 6))
      svg.append(
        make("line", { class: "rule", x1: x(v), x2: x(v), y1: pad.t, y2: height - pad.b }),
        make("text", { x: x(v), y: height - pad.b + 16, "text-anchor": "middle" }, String(v)),
      );
    for (const v of ticks(y0, y1, 5))
      svg.append(
        make("line", { class: "rule", x1: pad.l, x2: width - pad.r, y1: y(v), y2: y(v) }),
        make("text", { x: pad.l - 6, y: y(v) + 4, "text-anchor": "end" }, String(v)),
      );
    svg.append(
      make("text", { x: width - pad.r, y: height - 8, "text-anchor": "end", class: "name" }, labels.x),
      make("text", { x: pad.l, y: pad.t - 3, class: "name" }, labels.y),
    );
  }
  svg.append(
    make("line", { class: "axis", x1: pad.l, x2: width - pad.r, y1: height - pad.b, y2: height - pad.b }),
    make("line", { class: "axis", x1: pad.l, x2: pad.l, y1: pad.t, y2: height - pad.b }),
  );
  return { svg, x, y, left: pad.l, bottom: height - pad.b };
}

/** The boundary of what a front dominates. */
function boundary(front, box) {
  if (!front.length) return null;
  let d = `M${box.left},${box.y(front[0][1])}`;
  front.forEach(([px, py], i) => {
    d += `L${box.x(px)},${box.y(py)}L${box.x(px)},${i + 1 < front.length ? box.y(front[i + 1][1]) : box.bottom}`;
  });
  return d;
}

/** A marker: a square for source models, else the method's corners (a disc where it has none). */
function shape(kind, cx, cy, size, corners, color) {
  if (kind === "base" || kind === "source")
    return make("rect", { class: `p-${kind}`, x: cx - size, y: cy - size, width: 2 * size, height: 2 * size });
  const look = { class: color ? "p-each" : `p-${kind}`, fill: color };
  if (!corners) return make("circle", { ...look, cx, cy, r: size });
  const points = corners.map(([x, y]) => `${cx + 1.2 * size * x},${cy - 1.2 * size * y}`).join(" ");
  return make("polygon", { ...look, points });
}

const said = (model) =>
  `${model.method ? `${model.method}, ` : ""}${model.label}${model.kind === "aim" || model.kind === "variant" ? `, ${model.relaxation} at omega ${model.omega}` : model.kind === "merge" ? ", without AIM" : ""}${model.published ? " (published)" : ""}`;

function draw(pair, small) {
  const shown = core.models
    .map((model, i) => ({ model, i, px: model.scores[pair.x], py: model.scores[pair.y] }))
    .filter((p) => p.px !== undefined && p.py !== undefined);
  const room = Math.min(1100, Math.max(320, at("front").clientWidth - 20));
  const [width, height] = small ? [180, 130] : [room, Math.min(480, Math.max(300, room * 0.55))];
  const title = `${pair.y} over ${pair.x}`;
  const box = frame(
    width,
    height,
    shown.map((p) => p.px),
    shown.map((p) => p.py),
    { x: core.units[pair.x], y: core.units[pair.y], title },
    small,
  );
  const lines = [["without", null, pair.plain]];
  core.variants.forEach(({ color }, i) => lines.push([color ? "each" : "with", color, pair.relaxed[i]]));
  for (const [name, color, front] of lines) {
    const d = boundary(front, box);
    if (d) box.svg.append(make("path", { class: `front ${name}`, d, stroke: color }));
  }
  if (!small) {
    for (const p of shown) {
      const unrelaxed = shown.find((other) => other.i === p.model.unrelaxed);
      if (unrelaxed && (unrelaxed.px !== p.px || unrelaxed.py !== p.py))
        box.svg.append(arrow(box.x(unrelaxed.px), box.y(unrelaxed.py), box.x(p.px), box.y(p.py)));
    }
  }
  const order = ["base", "source", "merge", "variant", "aim"];
  const labels = [],
    marks = [];
  for (const p of [...shown].sort((a, b) => order.indexOf(a.model.kind) - order.indexOf(b.model.kind))) {
    const cx = box.x(p.px),
      cy = box.y(p.py),
      color = p.model.variant === null ? null : core.variants[p.model.variant].color,
      mark = shape(p.model.kind, cx, cy, small ? 2.2 : 5.5, core.methods[p.model.method], color);
    if (small) {
      marks.push(mark);
      continue;
    }
    const text = `${said(p.model)}: ${pair.x} ${p.px.toFixed(2)}, ${pair.y} ${p.py.toFixed(2)}`;
    marks.push(make("a", { tabindex: 0, role: "img", "aria-label": text }, make("title", {}, text), mark));
    if (p.model.kind === "base" || p.model.kind === "source") labels.push({ text: p.model.label, cx, cy });
  }
  labels.sort((a, b) => a.cy - b.cy);
  labels.forEach((label, i) => {
    const above = labels.slice(0, i).filter((other) => Math.abs(other.cx - label.cx) < 120);
    label.ty = Math.max(label.cy + 4, ...above.map((other) => other.ty + 13));
    const end = label.cx > width - 130;
    box.svg.append(
      make(
        "text",
        { class: "name", x: label.cx + (end ? -10 : 10), y: label.ty, "text-anchor": end ? "end" : "start" },
        label.text,
      ),
    );
  });
  box.svg.append(...marks); // above the labels, so that no label hides a model
  return box.svg;
}

function arrow(x1, y1, x2, y2) {
  const length = Math.hypot(x2 - x1, y2 - y1),
    ux = (x2 - x1) / length,
    uy = (y2 - y1) / length;
  const ex = x2 - ux * 7,
    ey = y2 - uy * 7;
  return make(
    "g",
    {},
    make("line", { class: "arrow", x1: x1 + ux * 6, y1: y1 + uy * 6, x2: ex, y2: ey }),
    length > 16
      ? make("polygon", {
          class: "tip",
          points: `${ex},${ey} ${ex - ux * 6 - uy * 3},${ey - uy * 6 + ux * 3} ${ex - ux * 6 + uy * 3},${ey - uy * 6 - ux * 3}`,
        })
      : null,
  );
}

function legend(entries) {
  return make("ul", { class: "legend" }, ...entries.map(([draw, text]) => make("li", {}, draw(), text)));
}
