// Items: filters, a list that draws only the rows in view, and one item in full.
const ROW = 64;
const state = { benchmark: null, questions: null, answers: {}, shown: [], selected: -1, query: "" };
const WORDS = { 1: "right", 0: "wrong", h: "in part", "-": "not asked" };

const chip = (verdict, name) =>
  make("span", { class: `v v${verdict}` }, name ? `${name} ${WORDS[verdict]}` : WORDS[verdict]);
const verdictOf = (model, i) => state.benchmark.verdicts[model]?.[i] ?? "-";
const chosenModels = () => [at("model-a").value, at("model-b").value].filter((value) => value !== "");
const snippet = (text) => text.replace(/\s+/g, " ").trim();

async function answersOf(model) {
  const name = `a${model}-${state.benchmark.column}`;
  if (!(name in state.answers)) state.answers[name] = await chunk(name);
  return state.answers[name];
}

async function chooseBenchmark(column) {
  state.benchmark = core.benchmarks.find((b) => b.column === column);
  state.questions = await chunk(`q-${column}`);
  const models = Object.keys(state.benchmark.verdicts).map(Number);
  const before = { a: at("model-a").value, b: at("model-b").value };
  const aim = models.find((m) => core.models[m].kind === "aim" && models.includes(core.models[m].unrelaxed));
  const start = aim === undefined ? [models[0], models[1]] : [core.models[aim].unrelaxed, aim];
  ["a", "b"].forEach((side, i) => {
    const select = at(`model-${side}`),
      keep = models.includes(Number(before[side])) && before[side] !== "";
    select.replaceChildren(...models.map((m) => option(m, said(core.models[m]))));
    if (side === "b") select.append(option("", "none"));
    select.value = keep ? before[side] : (start[i] ?? "");
  });
  await filter();
}

/** Which items the filters leave; a search looks into prompts and into the answers of A and B. */
async function filter() {
  const b = state.benchmark,
    query = at("search").value.trim().toLowerCase();
  state.query = query;
  const [a, second] = [at("model-a").value, at("model-b").value];
  const wants = [
    [a, at("want-a").value],
    [second, at("want-b").value],
  ].filter(([m, want]) => m !== "" && want !== "");
  const texts = query ? await Promise.all(chosenModels().map(answersOf)) : [];
  if (query !== at("search").value.trim().toLowerCase()) return;
  const matches = (i) => {
    if (`${b.tasks[b.items[i][0]]} ${b.items[i][1]}`.toLowerCase().includes(query)) return true;
    if (state.questions && state.questions[i].some((text) => text.toLowerCase().includes(query))) return true;
    return texts.some((found) => (found?.answers[i]?.t ?? []).some((text) => text.toLowerCase().includes(query)));
  };
  state.shown = [];
  for (let i = 0; i < b.items.length; i++) {
    if (wants.every(([m, want]) => verdictOf(m, i) === want) && (!query || matches(i))) state.shown.push(i);
  }
  const total = b.items.length < b.of ? `${b.items.length} (of ${b.of} that were asked)` : b.items.length;
  at("count").textContent = `${state.shown.length} of ${total} items`;
  at("spacer").style.height = `${state.shown.length * ROW}px`;
  at("list").scrollTop = 0;
  state.selected = -1;
  render();
  if (state.shown.length) select(0, false);
  else at("detail").replaceChildren(make("p", { class: "sub" }, "No item is left by these filters."));
}

/** Draw the rows in view. */
function render() {
  const list = at("list"),
    first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const last = Math.min(state.shown.length, first + Math.ceil(list.clientHeight / ROW) + 9);
  const rows = [];
  for (let at_ = first; at_ < last; at_++) {
    const i = state.shown[at_],
      [task, item] = state.benchmark.items[i];
    const text = state.questions ? question(state.questions[i][0]) : "";
    const row = make(
      "div",
      {
        class: "item",
        role: "option",
        id: `item-${at_}`,
        "aria-selected": String(at_ === state.selected),
        "aria-posinset": at_ + 1,
        "aria-setsize": state.shown.length,
        onclick: () => select(at_, true),
      },
      make(
        "div",
        { class: "top" },
        make("span", {}, `${state.benchmark.tasks[task]} #${item}`),
        ...chosenModels().map((m, side) => chip(verdictOf(m, i), "AB"[side])),
      ),
      make("div", { class: "text" }, snippet(text).slice(0, 200)),
    );
    row.style.top = `${at_ * ROW}px`;
    rows.push(row);
  }
  at("spacer").replaceChildren(...rows);
}

/** The part of a prompt that tells items apart: its end, without the beginning that all prompts share. */
function question(prompt) {
  const cut = shared();
  return prompt.slice(cut);
}

function shared() {
  if (state.sharedOf === state.benchmark) return state.sharedLength;
  const few = (state.questions ?? []).slice(0, 40).map((q) => q[0]);
  let length = few.length > 1 ? few[0].length : 0;
  for (const text of few) while (length && text.slice(0, length) !== few[0].slice(0, length)) length--;
  state.sharedOf = state.benchmark;
  state.sharedLength = length ? few[0].lastIndexOf("\n", length - 1) + 1 : 0;
  return state.sharedLength;
}

async function select(place, focus) {
  state.selected = place;
  const list = at("list"),
    top = place * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  render();
  list.setAttribute("aria-activedescendant", `item-${place}`);
  const i = state.shown[place],
    b = state.benchmark,
    [task, item] = b.items[i];
  const models = chosenModels();
  const found = await Promise.all(models.map(answersOf));
  if (state.selected !== place || state.shown[place] !== i) return;
  const parts = [make("h3", {}, `${b.tasks[task]} #${item}`)];
  if (state.questions) {
    parts.push(make("h3", {}, "Prompt"), block(state.questions[i][0]));
    parts.push(
      make("h3", {}, state.questions[i][1].includes("\n") ? "Tests or reference" : "Reference"),
      block(state.questions[i][1] || "(none)"),
    );
  }
  parts.push(make("div", { class: "answers" }, ...models.map((m, side) => answer(m, "AB"[side], i, found[side]))));
  const others = Object.keys(b.verdicts).filter((m) => !models.includes(m));
  if (others.length) {
    parts.push(
      make("h3", {}, "Other models"),
      make(
        "div",
        { class: "chips" },
        ...others.map((m) =>
          make(
            "button",
            {
              type: "button",
              title: "show as B",
              onclick: () => {
                at("model-b").value = m;
                select(place, false);
              },
            },
            `${said(core.models[m])} `,
            chip(verdictOf(m, i)),
          ),
        ),
      ),
    );
  }
  at("detail").replaceChildren(...parts);
  if (focus && matchMedia("(max-width: 52rem)").matches) at("detail").scrollIntoView({ block: "start" });
}

function items() {
  const known = core.benchmarks.filter((b) => Object.keys(b.verdicts).length);
  if (!known.length || !("DecompressionStream" in window)) {
    document.querySelector("[data-needs=items]").hidden = true;
    return;
  }
  at("items").hidden = false;
  at("benchmark").append(...known.map((b) => option(b.column, `${b.column} (${b.items.length})`)));
  at("benchmark").addEventListener("change", (event) => chooseBenchmark(event.target.value));
  for (const id of ["model-a", "model-b", "want-a", "want-b"]) at(id).addEventListener("change", filter);
  let timer = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(filter, 150);
  });
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  let waiting = false;
  at("list").addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      render();
    });
  });
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity };
  at("list").addEventListener("keydown", (event) => {
    if (!(event.key in steps) || !state.shown.length) return;
    event.preventDefault();
    select(Math.min(state.shown.length - 1, Math.max(0, state.selected + steps[event.key])), false);
  });
  new ResizeObserver(render).observe(at("list"));
  chooseBenchmark(known[0].column);
}

items();
