// One model's answer to one item. What models wrote is set as text, never parsed.
function answer(model, side, i, found) {
  const parts = [make("h3", {}, `${side}: ${said(core.models[model])}`, chip(verdictOf(model, i)))];
  const own = found?.answers[i];
  if (!own) return make("div", {}, ...parts, make("p", { class: "sub" }, "No answer is kept of this item."));
  if (own.p) parts.push(make("p", { class: "sub" }, "It was asked with another prompt:"), block(own.p));
  for (const text of own.t ?? []) parts.push(block(text));
  if (own.x !== undefined) parts.push(make("p", { class: "sub" }, `Taken as the answer: ${own.x || "nothing"}`));
  if (own.c) {
    const best = Math.max(...own.c.map(([, value]) => value ?? -Infinity));
    parts.push(
      make(
        "table",
        {},
        make(
          "tbody",
          {},
          ...own.c.map(([text, value]) =>
            make(
              "tr",
              { class: value === best ? "choice" : null },
              make("td", {}, text),
              make("td", { class: "n" }, value === null ? "-" : value.toFixed(3)),
              make("td", {}, value === best ? "chosen" : ""),
            ),
          ),
        ),
      ),
    );
  }
  const metrics = Object.entries(found.metrics).filter(([, values]) => values[i] !== null);
  if (metrics.length > 1)
    parts.push(make("p", { class: "sub" }, metrics.map(([name, values]) => `${name}: ${values[i]}`).join("; ")));
  return make("div", {}, ...parts);
}

/** Text in full, with what was searched for marked. */
function block(text) {
  const pre = make("pre", { tabindex: 0 });
  const lower = text.toLowerCase(),
    query = state.query;
  if (!query || lower.length !== text.length) {
    pre.textContent = text;
    return pre;
  }
  let from = 0;
  for (let hit = lower.indexOf(query); hit >= 0; hit = lower.indexOf(query, from)) {
    pre.append(text.slice(from, hit), make("mark", {}, text.slice(hit, hit + query.length)));
    from = hit + query.length;
  }
  pre.append(text.slice(from));
  return pre;
}
