"use strict";
// Copy buttons, sorting, filtering, folded sections, tooltips of figures, and a live page's reload.
// The page can be read without it.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  document.documentElement.classList.add("scripted");

  function say(text) {
    document.getElementById("said").textContent = text;
  }

  // Commands.
  async function copy(button) {
    const code = button.closest(".command").querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {  // no permission, or no secure context: the old way
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    const label = button.firstChild;
    label.data = "Copied";
    say("Command copied");
    setTimeout(() => { label.data = "Copy"; }, 2000);
  }

  // Sorting: a click goes from ascending to descending to the order the page came with.
  const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

  function key(row, column) {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return text === "" || text === "–" ? null : text;
  }

  function sort(table, column, direction) {
    const heads = table.tHead.rows[0].cells;
    all("th[aria-sort]", table.tHead).forEach((head) => head.setAttribute("aria-sort", "none"));
    heads[column].setAttribute("aria-sort", direction);
    const rows = table.ownOrder.map((row) => [key(row, column), row]);
    if (direction !== "none") {
      const sign = direction === "ascending" ? 1 : -1;
      const numbers = rows.every(([value]) => value === null || !Number.isNaN(Number(value)));
      const compare = numbers ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * compare(a, b);
      });
    }
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  function makeSortable(table) {
    table.ownOrder = [...table.tBodies[0].rows];
    all("thead th:not([data-fixed])", table).forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const direction = NEXT[head.getAttribute("aria-sort")];
        sort(table, head.cellIndex, direction);
        say(direction === "none" ? "Order as before" : `Sorted by ${button.textContent}, ${direction}`);
      });
    });
  }

  // Filtering: every word must be in the row; `rank=8` looks in the columns whose title begins so.
  function holds(text, wanted) {
    const first = text.split(" ")[0];
    return wanted === "" || Number.isNaN(Number(wanted)) ? text.startsWith(wanted) : Number(first) === Number(wanted);
  }

  const words = (row) => all(":scope > :not([data-fixed])", row).map((cell) => cell.textContent).join(" ").toLowerCase();

  function matcher(text, titles) {
    const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
      const [name, wanted] = word.split(/=(.*)/s);
      if (wanted === undefined) return (row) => words(row).includes(word);
      const columns = titles.flatMap((title, index) => (name && title.startsWith(name) ? [index] : []));
      return (row) => columns.some((index) => holds(row.cells[index].textContent.trim().toLowerCase(), wanted));
    });
    return (row) => tests.every((test) => test(row));
  }

  function makeFilterable(tools) {
    const table = document.getElementById(tools.dataset.filters);
    const [text, status] = [tools.querySelector("input"), tools.querySelector("select")];
    const titles = [...table.tHead.rows[0].cells].map((head) => head.textContent.trim().toLowerCase().replace(/\s/g, ""));
    const noun = tools.dataset.noun;
    const apply = () => {
      const matches = matcher(text.value, titles);
      let shown = 0;
      for (const row of table.ownOrder) {
        row.hidden = !((!status.value || row.dataset.status === status.value) && matches(row));
        shown += !row.hidden;
      }
      tools.querySelector("output").textContent = `${shown} of ${table.ownOrder.length} ${noun}`;
      table.querySelector("tfoot").hidden = shown > 0;
    };
    text.addEventListener("input", apply);
    status.addEventListener("change", apply);
    tools.addEventListener("apply", apply);
    apply();
  }

  // Folded sections: a link opens what it leads to, and printing opens all.
  function reveal(hash) {
    const target = hash.length > 1 ? document.getElementById(decodeURIComponent(hash.slice(1))) : null;
    let fold = target?.querySelector(":scope > .fold") ?? target?.closest("details");
    for (; fold; fold = fold.parentElement.closest("details")) fold.open = true;
    return target;
  }

  function openForPrinting() {
    const closed = all("details:not([open])");
    closed.forEach((one) => { one.open = true; });
    addEventListener("afterprint", () => closed.forEach((one) => { one.open = false; }), { once: true });
  }

  // Figures: near a curve or a point, say what it is. Distances are in CSS pixels.
  const NEAR = 24;
  const ON = 8;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");  // the table of trials has all of it
  tip.append(document.createElement("strong"), document.createElement("span"), document.createElement("i"));

  function placesOf(image) {
    const figure = image.closest("figure");
    figure.told ??= JSON.parse(figure.dataset.tooltips);
    const box = image.getBoundingClientRect();
    const at = matchMedia("(max-width: 600px)").matches ? 3 : 1;
    return figure.told.traces.map(([about, ...flat]) => {
      const places = [];
      for (let i = 0; i < flat.length; i += 5) {
        const [x, y] = [flat[i + at] * box.width / 1000, flat[i + at + 1] * box.height / 1000];
        places.push({ about: figure.told.texts[about], text: figure.told.texts[flat[i]], x, y });
      }
      return places;
    });
  }

  // The end of the nearest line that is nearer; a place that is pointed at itself comes before any line.
  function nearest(traces, x, y) {
    let best = { distance: NEAR };
    const offer = (place, distance) => { if (distance < best.distance) best = { place, distance }; };
    for (const places of traces) {
      places.forEach((end, index) => {
        const away = Math.hypot(end.x - x, end.y - y);
        offer(end, away <= ON ? away - NEAR : away);
        if (index === 0) return;
        const start = places[index - 1];
        const [dx, dy] = [end.x - start.x, end.y - start.y];
        const along = ((x - start.x) * dx + (y - start.y) * dy) / (dx * dx + dy * dy || 1);
        if (along < 0 || along > 1) return;
        offer(along > 0.5 ? end : start, Math.hypot(start.x + along * dx - x, start.y + along * dy - y));
      });
    }
    return best.place;
  }

  function tell(image, place) {
    const figure = image.closest("figure");
    const [box, outer] = [image.getBoundingClientRect(), figure.getBoundingClientRect()];
    const [heading, line, spot] = tip.children;
    heading.textContent = place.about;
    line.textContent = place.text;
    tip.hidden = false;
    figure.append(tip);
    const [x, y] = [box.left - outer.left + place.x, box.top - outer.top + place.y];
    const left = Math.max(0, Math.min(x - tip.offsetWidth / 2, outer.width - tip.offsetWidth));
    const above = y - tip.offsetHeight - 12;
    const top = outer.top + above < 0 ? y + 12 : above;
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
    spot.style.left = `${x - left}px`;
    spot.style.top = `${y - top}px`;
  }

  function point(event) {
    const image = event.target.closest?.("figure[data-tooltips] img");
    const box = image?.getBoundingClientRect();
    const place = image && nearest(placesOf(image), event.clientX - box.left, event.clientY - box.top);
    if (place) tell(image, place);
    else tip.hidden = true;
  }

  // With a keyboard, the arrows go from place to place.
  function makeTelling(image) {
    let index = -1;
    const go = (step) => {
      const places = placesOf(image).flat();
      index = (index + step + places.length) % places.length;
      tell(image, places[index]);
      say(`${places[index].about}, ${places[index].text}`);
    };
    image.tabIndex = 0;
    image.addEventListener("blur", () => { tip.hidden = true; });
    image.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") tip.hidden = true;
      if (!step) return;
      event.preventDefault();
      go(index < 0 && step < 0 ? 0 : step);
    });
  }

  // A live page loads itself again, and comes back to where its reader was. What is kept lives in this tab's history.
  const nameOf = (control) => control.id || control.textContent;
  const namesakes = (name) => all("a, button, input, select, summary, [tabindex]").filter((one) => nameOf(one) === name);

  function remember() {
    const shown = (part) => part.checkVisibility?.() ?? part.getClientRects().length > 0;
    const place = all("main section[id], main h3[id]").findLast((part) => shown(part) && part.getBoundingClientRect().top <= 1);
    const name = nameOf(document.activeElement);
    return {
      fields: all("input, select").map((field) => [field.id, field.value]),
      sorts: all("table[id]").map((table) => {
        const head = all("th[aria-sort]", table).find((one) => one.getAttribute("aria-sort") !== "none");
        return [table.id, head?.textContent, head?.getAttribute("aria-sort")];
      }),
      open: all("details[id]").map((one) => [one.id, one.open]),
      scrolled: all(".scroll[id]").map((one) => [one.id, one.scrollLeft, one.scrollTop]),
      focus: [name, namesakes(name).indexOf(document.activeElement)],
      place: place && [place.id, place.getBoundingClientRect().top],
    };
  }

  function recall(kept) {
    const find = (id) => (id ? document.getElementById(id) : null);
    kept.fields.forEach(([id, value]) => {
      const field = find(id);
      if (field && (field.tagName !== "SELECT" || [...field.options].some((one) => one.value === value))) field.value = value;
    });
    all("[data-filters]").forEach((tools) => tools.dispatchEvent(new Event("apply")));
    kept.sorts.forEach(([id, title, direction]) => {  // by title, as a column may have come or gone
      const table = find(id);
      const head = table && all("th[aria-sort]", table).find((one) => one.textContent === title);
      if (head) sort(table, head.cellIndex, direction);
    });
    kept.open.forEach(([id, open]) => { if (find(id)) find(id).open = open; });
    kept.scrolled.forEach(([id, left, top]) => find(id)?.scrollTo(left, top));
    namesakes(kept.focus[0])[kept.focus[1]]?.focus({ preventScroll: true });
    const place = kept.place && find(kept.place[0]);
    if (place) scrollBy({ top: place.getBoundingClientRect().top - kept.place[1], behavior: "instant" });
  }

  function keepFresh(button, seconds) {
    let paused = false;
    let typed = 0;
    document.addEventListener("input", () => { typed = Date.now(); });
    button.addEventListener("click", () => {
      paused = !paused;
      button.setAttribute("aria-pressed", paused);
    });
    // Not amid typing, nor while text is being selected or another tab is in front.
    const busy = () => paused || document.hidden || Date.now() - typed < 3000 || !getSelection().isCollapsed;
    setInterval(() => {
      if (busy()) return;
      history.replaceState({ kept: remember() }, "");
      location.reload();
    }, seconds * 1000);
  }

  document.addEventListener("DOMContentLoaded", () => {
    all("table.sortable").forEach(makeSortable);
    all("[data-filters]").forEach(makeFilterable);
    document.addEventListener("click", (event) => {
      const button = event.target.closest("button.copy");
      if (button) copy(button);
      const link = event.target.closest('a[href^="#"]');
      if (link) reveal(link.hash);
    });
    all("figure[data-tooltips] img").forEach(makeTelling);
    addEventListener("pointermove", point);
    addEventListener("pointerdown", point);
    addEventListener("hashchange", () => reveal(location.hash)?.scrollIntoView());
    addEventListener("beforeprint", openForPrinting);
    const live = document.getElementById("live");
    const kept = history.state?.kept;
    if (kept) {
      history.scrollRestoration = "manual";
      recall(kept);
      addEventListener("load", () => recall(kept), { once: true });  // once more, now that pictures have their height
      history.replaceState(null, "");
    } else {
      reveal(location.hash)?.scrollIntoView();
    }
    if (live) keepFresh(live.querySelector("button"), Number(live.dataset.seconds));
  });
})();
