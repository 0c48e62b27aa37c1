"use strict";
// Copy buttons, sorting, filtering, and a live page's reload. Everything on the page can be read without it.
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

  // A live page loads itself again, and comes back to where its reader was. What is kept lives in this tab's history.
  const nameOf = (control) => control.id || control.textContent;
  const namesakes = (name) => all("a, button, input, select, summary, [tabindex]").filter((one) => nameOf(one) === name);

  function remember() {
    const shown = (part) => part.getClientRects().length > 0;
    const place = all("main section[id], main h3[id]").findLast((part) => shown(part) && part.getBoundingClientRect().top <= 1);
    const name = nameOf(document.activeElement);
    return {
      fields: all("input, select").map((field) => [field.id, field.value]),
      sorts: all("table[id]").map((table) => {
        const head = all("th[aria-sort]", table).find((one) => one.getAttribute("aria-sort") !== "none");
        return [table.id, head?.cellIndex, head?.getAttribute("aria-sort")];
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
    kept.sorts.forEach(([id, column, direction]) => {
      const table = find(id);
      if (table && column !== undefined && column < table.tHead.rows[0].cells.length) sort(table, column, direction);
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
    });
    const live = document.getElementById("live");
    const kept = history.state?.kept;
    if (kept) {
      history.scrollRestoration = "manual";
      recall(kept);
      addEventListener("load", () => recall(kept), { once: true });  // once more, now that pictures have their height
      history.replaceState(null, "");
    }
    if (live) keepFresh(live.querySelector("button"), Number(live.dataset.seconds));
  });
})();
