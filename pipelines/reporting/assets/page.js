
"use strict";
// The gallery: cards from the page's data, filters, and the decisions that leave as review.csv.
// Names, tags and addresses are foreign text: they become text nodes and attribute values, never markup.
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const colours = new Map(data.classes);
  const choices = ["accept", "reject", "fix"];
  const decisions = new Map(); // key -> {decision, note}
  const storageName = `afa review ${data.run.name} ${data.run.config_digest}`;
  let shown = [];
  let active = null;

  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
    element.append(...children);
    return element;
  };
  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

  // A browser may refuse storage to a local file; decisions then last as long as the page is open.
  const remember = () => {
    try {
      localStorage.setItem(storageName, JSON.stringify([...decisions]));
    } catch { /* see above */ }
  };
  const recall = () => {
    try {
      for (const [key, value] of JSON.parse(localStorage.getItem(storageName) ?? "[]")) {
        if (choices.includes(value.decision)) decisions.set(key, { decision: value.decision, note: String(value.note) });
      }
    } catch { /* see above */ }
  };

  const chip = (tag, area) => {
    const dot = make("span", { class: "dot", "aria-hidden": "true" });
    dot.style.background = colours.get(tag) ?? "transparent";
    return make("li", area > 0 ? {} : { class: "empty" }, dot, area > 0 ? `${tag} ${percent(area)}` : `${tag}: no pixels`);
  };

  const chips = (item) => {
    const list = make("ul", { class: "chips", "aria-label": item.given ? "tags, given" : "tags, predicted" });
    list.append(...item.areas.map(([tag, area]) => chip(tag, area)));
    list.append(...item.lacking.map((tag) => make("li", { class: "empty" }, `${tag}: not among the tags`)));
    if (!list.children.length) list.append(make("li", { class: "empty" }, "nothing found"));
    return list;
  };

  const facts = (item) => {
    const rows = [["uncertainty", item.uncertainty], ["confidence", item.confidence], ["disagreement", item.disagreement]];
    if (item.distance !== null) rows.push(["changed since earlier", item.distance]);
    const list = make("dl", { class: "facts" });
    for (const [name, value] of rows) list.append(make("dt", {}, name), make("dd", {}, value.toFixed(2)));
    return list;
  };

  // What speaks most against the label and, in a sample, how it came to be in it.
  const reason = (item) => {
    const whys = { uncertain: "among the most uncertain", random: "drawn at random" };
    const words = data.cards.length < data.labels ? `${data.doubts[item.doubt]}; ${whys[item.why]}` : data.doubts[item.doubt];
    return make("p", { class: "reason" }, words);
  };

  const stage = (item) => {
    const place = make("div", { class: "stage" });
    if (item.picture) place.append(make("img", { class: "picture", src: item.picture, alt: "", decoding: "async" }));
    place.append(make("img", { class: "mask", src: item.mask, alt: "", decoding: "async" }));
    if (!item.picture) place.append(make("div", { class: "missing" }, `picture: ${item.problem}`));
    return place;
  };

  const build = (item, index) => {
    const title = make("h3", { id: `card-${index}`, title: item.uri }, item.key);
    const buttons = choices.map((choice) => {
      const button = make("button", { type: "button", class: choice, "aria-pressed": "false" }, choice);
      button.addEventListener("click", () => decide(card, choice));
      return button;
    });
    const note = make("input", { type: "text", maxlength: "500" });
    const label = make("label", { class: "note", hidden: "" }, "note", note);
    const group = make("div", { class: "decide", role: "group", "aria-labelledby": `card-${index}` }, ...buttons);
    const element = make("li", { class: "card", "aria-labelledby": `card-${index}`, "aria-describedby": "keys" },
      stage(item), make("div", { class: "body" }, title, chips(item), facts(item), reason(item), group, label));
    const card = { item, element, buttons, note, label };
    note.addEventListener("input", () => {
      decisions.get(item.key).note = note.value;
      remember();
    });
    element.addEventListener("focusin", () => activate(card));
    element.addEventListener("keydown", (event) => onKey(event, card));
    return card;
  };

  const paint = (card) => {
    const entry = decisions.get(card.item.key);
    card.element.dataset.decision = entry?.decision ?? "none";
    for (const button of card.buttons) button.setAttribute("aria-pressed", String(button.className === entry?.decision));
    card.label.hidden = !entry;
    card.note.value = entry?.note ?? "";
  };

  const count = () => {
    const total = { accept: 0, reject: 0, fix: 0 };
    for (const { decision } of decisions.values()) total[decision] += 1;
    const parts = choices.filter((choice) => total[choice]).map((choice) => `${total[choice]} ${choice}`);
    byId("decided").textContent = parts.length ? parts.join(", ") : "nothing decided yet";
    byId("download").disabled = byId("clear").disabled = !parts.length;
  };

  const decide = (card, choice) => {
    const entry = decisions.get(card.item.key);
    if (entry?.decision === choice) decisions.delete(card.item.key);
    else decisions.set(card.item.key, { decision: choice, note: entry?.note ?? "" });
    paint(card);
    count();
    remember();
  };

  // One card at a time is in the tab order, with what is in it; arrow keys go from card to card.
  const reachable = (card, yes) => {
    for (const element of [card.element, ...card.buttons, card.note]) element.tabIndex = yes ? 0 : -1;
  };
  const activate = (card) => {
    if (card === active) return;
    if (active) reachable(active, false);
    if (card) reachable(card, true);
    active = card;
  };

  const neighbour = (card, key) => {
    const index = shown.indexOf(card);
    const top = shown[0].element.offsetTop;
    const columns = Math.max(1, shown.filter(({ element }) => element.offsetTop === top).length);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -index, End: shown.length - 1 - index };
    return key in steps ? shown[index + steps[key]] ?? card : null;
  };

  const onKey = (event, card) => {
    if (event.target === card.note || event.ctrlKey || event.metaKey || event.altKey) return;
    const choice = choices.find((name) => name[0] === event.key.toLowerCase());
    const next = neighbour(card, event.key);
    if (choice) decide(card, choice);
    else if (next) next.element.focus();
    else if (event.key === " " && event.target === card.element) peek(card);
    else return;
    event.preventDefault();
  };

  // The other of two looks: the bare mask where the slider shows the bare picture, else the bare picture.
  const peek = (card) => {
    const name = Number(byId("view").value) === 0 ? "peek-mask" : "peek";
    const had = card.element.classList.contains("peek") || card.element.classList.contains("peek-mask");
    card.element.classList.remove("peek", "peek-mask");
    if (!had) card.element.classList.add(name);
  };

  const showView = () => {
    const value = Number(byId("view").value);
    const style = byId("cards").style;
    style.setProperty("--picture", String(Math.min(1, (100 - value) / 50)));
    style.setProperty("--mask", String(value <= 50 ? (0.6 * value) / 50 : 0.6 + (0.4 * (value - 50)) / 50));
    const name = value < 25 ? "picture" : value > 75 ? "mask" : "overlay";
    byId("view").setAttribute("aria-valuetext", `${name}, ${value} %`);
  };

  const byMeasure = {
    uncertainty: (one, other) => other.uncertainty - one.uncertainty,
    confidence: (one, other) => one.confidence - other.confidence,
    disagreement: (one, other) => other.disagreement - one.disagreement,
    distance: (one, other) => (other.distance ?? -1) - (one.distance ?? -1),
    key: () => 0,
  };
  const byKey = (one, other) => (one.key < other.key ? -1 : one.key > other.key ? 1 : 0);

  const fits = ({ item }) => {
    const tag = byId("filter-class").value;
    const doubt = byId("filter-doubt").value;
    const decision = byId("filter-decision").value;
    return (!tag || item.areas.some(([name, area]) => name === tag && area > 0))
      && (!doubt || item.doubt === doubt)
      && (!decision || (decisions.get(item.key)?.decision ?? "none") === decision);
  };

  const cards = data.cards.map(build);
  const arrange = () => {
    const compare = byMeasure[byId("sort").value];
    cards.sort((one, other) => compare(one.item, other.item) || byKey(one.item, other.item));
    shown = cards.filter(fits);
    for (const card of cards) card.element.hidden = true;
    for (const card of shown) card.element.hidden = false;
    byId("cards").append(...cards.map(({ element }) => element));
    byId("none").hidden = shown.length > 0;
    byId("shown").textContent = `${shown.length} of ${cards.length} shown; ${data.labels.toLocaleString("en")} labels in all`;
    activate(shown[0] ?? null);
  };

  // Spreadsheets read "=1+1" as a formula and 0007 as 7. No key begins with a dot: "./" in front changes neither.
  const quoted = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const toCsv = () => {
    const rows = [["key", "decision", "note", "mask", "run", "model_digest", "config_digest"]];
    for (const [key, { decision, note }] of decisions) {
      rows.push([`./${key}`, decision, note, "", data.run.name, data.run.model_digest, data.run.config_digest]);
    }
    return rows.map((row) => `${row.map(quoted).join(",")}\r\n`).join("");
  };

  const download = () => {
    const link = make("a", { download: "review.csv", href: URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  };

  const clear = () => {
    if (!confirm("Forget every decision?")) return;
    decisions.clear();
    cards.forEach(paint);
    count();
    remember();
  };

  const filterQuarantined = () => {
    const reason = byId("filter-reason").value;
    let visible = 0;
    for (const row of document.querySelectorAll("#quarantined-rows tbody tr")) {
      row.hidden = reason !== "" && row.cells[1].textContent !== reason;
      visible += row.hidden ? 0 : 1;
    }
    byId("quarantined-shown").textContent = `${visible} rows shown`;
  };

  const option = (value, words) => make("option", { value }, words);
  const present = new Set(data.cards.flatMap(({ areas }) => areas.filter(([, area]) => area > 0).map(([tag]) => tag)));
  byId("filter-class").append(...data.classes.map(([name]) => name).filter((name) => present.has(name)).map((name) => option(name, name)));
  const doubts = new Set(data.cards.map(({ doubt }) => doubt));
  byId("filter-doubt").append(...Object.entries(data.doubts).filter(([name]) => doubts.has(name)).map(([name, words]) => option(name, words)));
  if (data.cards.some(({ distance }) => distance !== null)) byId("sort").append(option("distance", "change since the earlier run"));
  byId("command").textContent = data.command;

  for (const id of ["filter-class", "filter-doubt", "filter-decision", "sort"]) byId(id).addEventListener("change", arrange);
  byId("view").addEventListener("input", showView);
  byId("download").addEventListener("click", download);
  byId("clear").addEventListener("click", clear);
  byId("filter-reason")?.addEventListener("change", filterQuarantined);
  for (const element of document.querySelectorAll(".controls, #actions, #keys, #apply")) element.hidden = cards.length === 0;
  byId("none").hidden = true;
  recall();
  cards.forEach((card) => {
    reachable(card, false);
    paint(card);
  });
  arrange();
  showView();
  count();
  if (byId("filter-reason")) byId("filter-reason").closest("label").hidden = false;
}
