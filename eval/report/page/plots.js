// What is plotted: Pareto fronts of pairs of benchmarks, and curves over omega.
function fronts() {
  const pairs = core.pairs,
    grid = at("pairs");
  if (!pairs.length) {
    at("fronts").hidden = true;
    return;
  }
  let chosen = { x: pairs[0].x, y: pairs[0].y };
  const names = core.columns.filter((c) => pairs.some((p) => p.x === c || p.y === c));
  for (const select of [at("front-x"), at("front-y")]) select.append(...names.map((name) => option(name, name)));
  const find = (x, y) => {
    const pair = pairs.find((p) => (p.x === x && p.y === y) || (p.x === y && p.y === x));
    if (!pair || pair.x === x) return pair;
    const turn = (front) => front.map(([a, b]) => [b, a]).reverse();
    return { x, y, plain: turn(pair.plain), relaxed: pair.relaxed.map(turn) };
  };
  const kinds = Object.keys(NAMES).filter((kind) => core.models.some((m) => m.kind === kind));
  const show = () => {
    const pair = find(chosen.x, chosen.y);
    at("front-x").value = chosen.x;
    at("front-y").value = chosen.y;
    const dot = (kind) => () =>
      make("svg", { viewBox: "0 0 26 16", class: "plot", "aria-hidden": "true" }, shape(kind, 13, 8, 5));
    const line = (name, color) => () =>
      make(
        "svg",
        { viewBox: "0 0 26 16", class: "plot", "aria-hidden": "true" },
        make("path", { class: `front ${name}`, d: "M1,8L25,8", stroke: color }),
      );
    const sign = (corners) => () =>
      make("svg", { viewBox: "0 0 26 16", class: "plot", "aria-hidden": "true" }, shape("method", 13, 8, 5, corners));
    const entries = kinds.map((kind) => [dot(kind), NAMES[kind]]);
    if (pair.plain.length) entries.push([line("without", null), "front without AIM"]);
    core.variants.forEach((variant, i) => {
      if (pair.relaxed[i].length)
        entries.push([
          line(variant.color ? "each" : "with", variant.color),
          variant.color ? `front with ${variant.label}` : "front with AIM",
        ]);
    });
    for (const [method, corners] of Object.entries(core.methods)) entries.push([sign(corners), method]);
    at("front").replaceChildren(draw(pair, false), legend(entries));
    for (const button of grid.children)
      button.setAttribute("aria-pressed", String(button.dataset.x === chosen.x && button.dataset.y === chosen.y));
  };
  for (const pair of pairs) {
    grid.append(
      make(
        "button",
        {
          type: "button",
          "data-x": pair.x,
          "data-y": pair.y,
          "aria-label": `${pair.y} over ${pair.x}`,
          onclick: () => {
            chosen = { x: pair.x, y: pair.y };
            show();
          },
        },
        draw(pair, true),
        `${pair.y} over ${pair.x}`,
      ),
    );
  }
  const change = (axis) => (event) => {
    const other = axis === "x" ? "y" : "x";
    if (event.target.value === chosen[other]) chosen[other] = chosen[axis];
    chosen[axis] = event.target.value;
    show();
  };
  at("front-x").addEventListener("change", change("x"));
  at("front-y").addEventListener("change", change("y"));
  show();
  let width = at("front").clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(at("front").clientWidth - width) < 20) return;
    width = at("front").clientWidth;
    show();
  }).observe(at("front"));
}

function curves() {
  if (!core.curves.length) {
    document.querySelector("[data-needs=omega]").hidden = true;
    return;
  }
  at("omega").hidden = false;
  for (const family of core.curves) {
    const plots = Object.entries(family.lines).map(([name, points]) => {
      const ends = points.flatMap((p) => [p[1], p[2] ?? p[1], p[3] ?? p[1]]);
      const box = frame(
        300,
        200,
        [0, 1],
        ends,
        { x: "omega", y: core.units[name], title: `${name} over omega` },
        false,
      );
      for (const p of points)
        if (p[2] !== null)
          box.svg.append(
            make("line", { class: "arrow", x1: box.x(p[0]), x2: box.x(p[0]), y1: box.y(p[2]), y2: box.y(p[3]) }),
          );
      box.svg.append(
        make("path", { class: "front with", d: `M${points.map((p) => `${box.x(p[0])},${box.y(p[1])}`).join("L")}` }),
      );
      for (const p of points) {
        const text = `omega ${p[0]}: ${p[1].toFixed(3)}${p[2] === null ? "" : ` (${p[2].toFixed(3)} to ${p[3].toFixed(3)})`}`;
        box.svg.append(
          make(
            "a",
            { tabindex: 0, role: "img", "aria-label": text },
            make("title", {}, text),
            shape(p[0] === 1 ? "merge" : "aim", box.x(p[0]), box.y(p[1]), 4.5, core.methods[family.method]),
          ),
        );
      }
      return make("figure", {}, box.svg);
    });
    at("curves").append(
      make("div", {}, make("h3", {}, `${family.method}, ${family.label}`), make("div", { class: "curves" }, ...plots)),
    );
  }
}

fronts();
curves();
