"use strict";
(() => {
  const PAGE = 120, TYPICAL = 50;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const n = data.names.length;
  const main = byId("main"), detail = byId("detail"), tray = byId("tray"), status = byId("status");

  // Every text of the data reaches the page through here, so none of it is ever read as HTML.
  function element(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "className") node.className = value;
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  const tool = (text, onclick, more = {}) =>
    element("button", { type: "button", className: "tool", onclick, ...more }, text);

  function numbers(text, type) {
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new type(bytes.buffer);
  }
  function once(make) {
    let value;
    return () => (value === undefined ? (value = make()) : value);
  }
  const range = (length, make = (i) => i) => Array.from({ length }, (_, i) => make(i));

  const labels = numbers(data.labels, Int32Array);
  const place = numbers(data.place, Uint32Array);
  const neighbours = once(() => numbers(data.neighbours, Uint32Array));
  const cosines = once(() => numbers(data.cosines, Float32Array));
  const positions = once(() => numbers(data.positions, Float32Array));
  const taken = once(() => numbers(data.taken, Float64Array));
  const scales = data.scales.map((scale) => {
    const cluster = numbers(scale.cluster, Uint16Array);
    const certainty = numbers(scale.certainty, Float32Array);
    const members = once(() => {
      const lists = range(scale.count, () => []);
      for (let i = 0; i < n; i++) lists[cluster[i]].push(i);
      for (const list of lists) list.sort((a, b) => certainty[b] - certainty[a] || a - b);
      return lists;
    });
    return { ...scale, cluster, certainty, members, names: {} };
  });
  const everything = range(n);
  const count = (value) => value.toLocaleString("en");
  const images = (value) => `${count(value)} image${value === 1 ? "" : "s"}`;
  const percent = (part, whole) => `${Math.round((100 * part) / whole)}\u00a0%`;
  const fraction = (value) => (value > 0.9995 && value < 1 ? "> 0.999" : value.toFixed(3));
  const colour = (k) => {
    const light = getComputedStyle(document.documentElement).getPropertyValue("--point-light");
    return `oklch(${light.trim()} ${0.15 - 0.03 * (k % 3)} ${((k * 137.508) % 360).toFixed(1)})`;
  };
  const labelName = (i) => (labels[i] < 0 ? null : data.classes[labels[i]]);
  const date = (i) => (Number.isNaN(taken()[i]) ? null : new Date(1000 * taken()[i]).toISOString());
  const fileName = (i) => data.names[i].split("/").pop();

  // The owner's notes: names of clusters, tags, the selection. The browser keeps them by folder.
  const folder = data.link ? new URL(`${data.link}/`, location.href).href : data.title;
  const notes = { clusters: [], tags: {}, selected: [] };
  const storage = `c2bin-explore ${folder}`;
  try {
    Object.assign(notes, JSON.parse(localStorage.getItem(storage)));
  } catch { /* a browser that keeps nothing, or something else's note */ }
  const numberOf = once(() => new Map(data.names.map((name, i) => [name, i])));
  const selected = new Set(notes.selected.map((name) => numberOf().get(name)).filter((i) => i >= 0));
  // A name belongs to a cluster that holds most of the images that were most typical when it was given:
  // after a change of clusters, one of as many clusters or, without such a scale, the most alike of all.
  function adopt(note, over = false) {
    const known = note.files.map((file) => numberOf().get(file)).filter((i) => i >= 0);
    const same = scales.filter((scale) => scale.count === note.count);
    let best = 0, names = {}, own = 0;
    for (const scale of same.length ? same : scales) {
      const votes = new Map();
      for (const i of known) votes.set(scale.cluster[i], (votes.get(scale.cluster[i]) || 0) + 1);
      for (const [k, shared] of votes) {
        const alike = (shared * note.size) / (note.size + scale.members()[k].length);
        if (2 * shared > known.length && alike > best) {
          [best, names, own] = [alike, scale.names, k];
        }
      }
    }
    if (names[own] && !over) return false;
    names[own] = note;
    return best > 0;
  }
  // Of several that find the same place the first keeps it.
  const byRank = (a, b) => b.size - a.size || a.count - b.count || (a.name < b.name ? -1 : 1);
  const homeless = notes.clusters.sort(byRank).filter((note) => !adopt(note));
  function keep() {
    notes.clusters = [...homeless, ...scales.flatMap((scale) => Object.values(scale.names))];
    notes.selected = [...selected].map((i) => data.names[i]);
    try {
      localStorage.setItem(storage, JSON.stringify(notes));
    } catch {
      status.textContent = "This browser keeps no notes: export them before you close the page.";
    }
  }
  const tagsOf = (i) => (Object.hasOwn(notes.tags, data.names[i]) ? notes.tags[data.names[i]] : []);
  function setTags(i, tags) {
    if (tags.length) notes.tags[data.names[i]] = [...new Set(tags)];
    else delete notes.tags[data.names[i]];
  }
  const ownName = (s, k) => scales[s].names[k]?.name || "";
  const clusterName = (s, k) => ownName(s, k) || `Cluster ${k}`;
  function setName(s, k, name) {
    const { count, names, members } = scales[s], list = members()[k];
    const files = list.slice(0, TYPICAL).map((i) => data.names[i]);
    if (name.trim()) names[k] = { name: name.trim(), count, size: list.length, files };
    else delete names[k];
    keep();
  }

  // Thumbnails: files beside the page, or chunks that follow this script, so one may not be there yet.
  const chunks = new Map();
  function thumbnail(i) {
    if (!data.chunk) return `index-thumbnails/${Math.floor(i / data.folder)}/${i}.${data.suffix}`;
    const number = Math.floor(place[i] / data.chunk);
    if (!chunks.has(number)) {
      const node = byId(`thumbnails-${number}`);
      // An element that is still being parsed holds half of its text.
      if (!node || (document.readyState === "loading" && !node.nextElementSibling)) return null;
      chunks.set(number, JSON.parse(node.textContent));
      node.textContent = "";
    }
    return chunks.get(number)[place[i] % data.chunk];
  }
  let waiting = [];
  function fill(image, i) {
    const source = thumbnail(i);
    if (source) image.src = source;
    else waiting.push([image, i]);
  }
  function retry() {
    const again = waiting;
    waiting = [];
    for (const [image, i] of again) if (image.isConnected) fill(image, i);
    if (document.readyState === "loading") setTimeout(retry, 60);
  }
  setTimeout(retry, 60);
  document.addEventListener("DOMContentLoaded", retry);

  // Images get their source when they come near the screen, and a long list its next images.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      if (entry.target.more) { entry.target.more(); continue; }
      watcher.unobserve(entry.target);
      fill(entry.target, Number(entry.target.dataset.image));
    }
  }, { rootMargin: "400px" });

  const blank = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";
  function picture(i, alt = "") {
    const image = element("img", { alt, src: blank, "data-image": i, draggable: "false" });
    watcher.observe(image);
    return image;
  }

  // Selecting
  let lastChosen = null;
  function select(list, on = true) {
    for (const i of list) {
      if (on) selected.add(i);
      else selected.delete(i);
    }
    keep();
    showSelection();
  }
  function showSelection() {
    for (const box of document.querySelectorAll(".tile input")) {
      box.checked = selected.has(Number(box.value));
    }
    tray.hidden = !selected.size;
    document.body.classList.toggle("with-tray", selected.size > 0);
    byId("selected-count").textContent = `${count(selected.size)} selected`;
  }
  function choose(i, list, through) {
    const on = !selected.has(i);
    const from = through && lastChosen !== null ? list.indexOf(lastChosen) : -1, to = list.indexOf(i);
    if (from < 0) select([i], on);
    else select(list.slice(Math.min(from, to), Math.max(from, to) + 1));
    lastChosen = i;
  }

  // What the arrow keys of an open image go through: the list that it was opened from.
  let around = everything;
  function tile(i, list, caption = null) {
    const open = (event) => {
      if (event.shiftKey || event.ctrlKey || event.metaKey) { choose(i, list, event.shiftKey); return; }
      around = list;
      location.hash = `#/image/${i}`;
    };
    const button = element("button", { type: "button", className: "image", title: data.names[i],
      "aria-label": caption ? `${data.names[i]}, ${caption}` : data.names[i], onclick: open }, picture(i));
    if (caption) button.append(element("span", { "aria-hidden": "true" }, caption));
    const box = element("input", { type: "checkbox", value: i, tabindex: "-1",
      "aria-label": `Select ${data.names[i]}`,
      onclick: (event) => { event.stopPropagation(); choose(i, list, event.shiftKey); } });
    box.checked = selected.has(i);
    const item = element("li", { className: "tile" }, button, box);
    item.choose = (through) => choose(i, list, through);
    return item;
  }
  // A long list grows by a page at a time, so that the browser never holds what nobody looks at.
  function gallery(list, caption = () => null) {
    const grid = element("ul", { className: "images" }), box = element("div", {}, grid);
    let drawn = 0;
    const add = () => {
      const next = list.slice(drawn, drawn + PAGE);
      grid.append(...next.map((i) => tile(i, list, caption(i))));
      drawn += next.length;
      if (drawn >= list.length) more.remove();
      else more.textContent = `Show more (${count(drawn)} of ${count(list.length)} are shown)`;
      return next.length;
    };
    const more = tool("", () => {
      const before = drawn;
      if (add()) grid.children[before].firstChild.focus();
    });
    more.more = add;
    if (list.length > PAGE) { box.append(more); watcher.observe(more); }
    add();
    return box;
  }
  const selectAll = (list) => tool(`Select all ${count(list.length)}`, () => select(list));

  function mix(list) {
    if (!data.classes.length || !list.length) return null;
    const counts = new Map();
    for (const i of list) counts.set(labels[i], (counts.get(labels[i]) || 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const items = sorted.slice(0, 3).map(([label, size]) => element("li", {},
      `${label < 0 ? "no label" : data.classes[label]} ${percent(size, list.length)}`));
    if (sorted.length > 3) items.push(element("li", {}, `${sorted.length - 3} more`));
    return element("ul", { className: "mix", "aria-label": "Labels" }, ...items);
  }
  function swatch(k) {
    const node = element("span", { className: "swatch", "aria-hidden": "true" });
    node.style.background = colour(k);
    return node;
  }
  function card(name, href, list) {
    const shown = list.slice(0, list.length < 4 ? 1 : 4);
    return element("li", { className: "card" },
      element("a", { href }, element("span", { className: `mosaic of-${shown.length}` },
        ...shown.map((i) => picture(i))), element("b", {}, name)),
      element("span", { className: "quiet" }, ` ${count(list.length)}`), mix(list));
  }
  const cards = (list) => element("ul", { className: "cards" }, ...list);

  const heading = (text) => element("h2", { tabindex: "-1" }, text);
  const quiet = (text) => element("p", { className: "quiet" }, text);
  const missing = (text) => [heading("Not found"), element("p", {}, text)];
  let scaleIndex = 0;
  let lastView = "#/clusters";

  // Clusters: a path of (scale, cluster), each inside the one before, coarse to fine.
  const hrefOf = (path) => `#/clusters${path.map(([s, k]) => `/${s}.${k}`).join("")}`;
  function clustersView(...parts) {
    const path = parts.filter(Boolean).map((part) => part.split(".").map(Number));
    const known = (part) => /^\d+\.\d+$/.test(part) && scales[part.split(".")[0]]?.count > part.split(".")[1];
    if (!parts.filter(Boolean).every(known)) return missing("There is no such cluster.");
    const last = path.at(-1), next = last ? last[0] + 1 : scaleIndex;
    const inside = last ? scales[last[0]].members()[last[1]].filter((i) =>
      path.every(([s, k]) => scales[s].cluster[i] === k)) : everything;
    const view = [];
    if (last) {
      const crumbs = path.slice(0, -1).map((step, at) => element("li", {},
        element("a", { href: hrefOf(path.slice(0, at + 1)) }, clusterName(...step))));
      view.push(element("nav", { "aria-label": "Where this is", className: "crumbs" }, element("ol", {},
        element("li", {}, element("a", { href: "#/clusters" }, "All clusters")), ...crumbs)));
      const title = heading(clusterName(...last));
      view.push(title, element("div", { className: "tools" },
        element("label", {}, "Name ", element("input", { id: "name", value: ownName(...last),
          placeholder: clusterName(...last), oninput: (event) => {
            setName(...last, event.target.value);
            title.textContent = clusterName(...last);
          } })),
        element("span", {}, `${images(inside.length)}, ${percent(inside.length, n)} of all`),
        selectAll(inside)));
      const composition = mix(inside);
      if (composition) view.push(composition);
    } else view.push(heading(`${scales[next].count} clusters`), quiet(scoreText(scales[next])));
    if (scales[next]) {
      const groups = range(scales[next].count, () => []);
      const order = last ? inside.slice() : [];
      if (last) {
        order.sort((a, b) => scales[next].certainty[b] - scales[next].certainty[a] || a - b);
        for (const i of order) groups[scales[next].cluster[i]].push(i);
      }
      const found = (last ? groups : scales[next].members()).map((list, k) => [k, list])
        .filter(([, list]) => list.length).sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
      if (!last || found.length > 1) {
        if (last) view.push(element("h3", {}, `Closer: ${found.length} of ${scales[next].count} finer clusters`));
        view.push(cards(found.map(([k, list]) =>
          card(clusterName(next, k), hrefOf([...path, [next, k]]), list))));
      }
    }
    if (last) {
      const typical = (i) => scales[last[0]].certainty[i];
      view.push(...sorted(inside, {
        "most typical first": [(a, b) => typical(b) - typical(a), (i) => fraction(typical(i))],
        "least typical first": [(a, b) => typical(a) - typical(b), (i) => fraction(typical(i))],
        "by date": [(a, b) => (taken()[a] || 0) - (taken()[b] || 0), (i) => date(i)?.slice(0, 10)],
        "by name": [(a, b) => a - b, fileName],
      }));
    }
    return view;
  }
  // A gallery whose order can be chosen.
  function sorted(list, orders) {
    const choice = element("select", { id: "order" }, ...Object.keys(orders).map((name) =>
      element("option", {}, name)));
    let box = element("div");
    const draw = () => {
      const [compare, caption] = orders[choice.value];
      const fresh = gallery(list.slice().sort((a, b) => compare(a, b) || a - b), caption);
      box.replaceWith(fresh);
      box = fresh;
    };
    choice.addEventListener("change", draw);
    const parts = [element("div", { className: "tools" }, element("label", {}, "Images ", choice)), box];
    draw();
    parts[1] = box;
    return parts;
  }
  function scoreText(scale) {
    const scores = scale.scores;
    let text = `${scores.in_use} of ${scale.count} clusters hold images.`;
    if (scores.nmi !== undefined) {
      text += ` Against the labels: NMI ${scores.nmi.toFixed(3)}, ACC ${scores.acc.toFixed(3)}, ` +
        `purity ${scores.purity.toFixed(3)}.`;
    }
    if (scores.in_use < Math.max(2, scale.count / 10)) {
      text += " This scale has collapsed: it does not tell images apart.";
    }
    return text;
  }

  // "é" may be one character or two, of which file systems have their own opinions.
  const plain = (text) => text.normalize("NFC").toLowerCase().replaceAll("\\\\", "\\");
  function searchView(query = "") {
    const words = plain(query).split(/\s+/).filter(Boolean);
    const found = everything.filter((i) => {
      const named = scales.map((scale, s) => ownName(s, scale.cluster[i]));
      const text = plain([data.names[i], ...tagsOf(i), ...named].join(" "));
      return words.every((word) => text.includes(word));
    });
    const text = words.length ? `${images(found.length)} with “${query}”` : `All ${images(n)}`;
    status.textContent = text;
    if (byId("query") !== document.activeElement) byId("query").value = query;
    return [heading(text), quiet("In names of files and clusters, and in tags."),
      element("div", { className: "tools" }, selectAll(found)), gallery(found, fileName)];
  }
  function timeView(month) {
    const months = new Map();
    for (const i of everything) {
      const key = date(i)?.slice(0, 7) ?? "none";
      if (!months.has(key)) months.set(key, []);
      months.get(key).push(i);
    }
    const name = (key) => (key === "none" ? "No date" : key);
    if (month) {
      const list = months.get(month);
      if (!list) return missing("There is no image of that month.");
      list.sort((a, b) => taken()[a] - taken()[b] || a - b);
      return [heading(name(month)), element("div", { className: "tools" }, selectAll(list)),
        gallery(list, (i) => date(i)?.slice(0, 16).replace("T", " ") ?? fileName(i))];
    }
    return [heading("Timeline"), quiet("By the date in the photograph (EXIF), by month."),
      cards([...months.keys()].sort().map((key) => card(name(key), `#/time/${key}`, months.get(key))))];
  }
  function duplicatesView() {
    const k = data.neighbourCount, box = element("div"), text = element("output");
    let groups = [];
    const slider = element("input", { type: "range", id: "threshold", min: "0.7", max: "1",
      step: "0.005", value: "0.9" });
    const draw = () => {
      const threshold = Number(slider.value) - 1e-6, root = everything.slice();
      const find = (i) => { while (root[i] !== i) i = root[i] = root[root[i]]; return i; };
      for (let i = 0; i < n; i++) {
        for (let r = 0; r < k && cosines()[i * k + r] >= threshold; r++) {
          root[find(i)] = find(neighbours()[i * k + r]);
        }
      }
      const lists = new Map();
      for (let i = 0; i < n; i++) {
        const own = find(i);
        if (!lists.has(own)) lists.set(own, []);
        lists.get(own).push(i);
      }
      groups = [...lists.values()].filter((list) => list.length > 1).sort((a, b) => b.length - a.length);
      const held = groups.reduce((sum, list) => sum + list.length, 0);
      text.textContent = ` ${Number(slider.value).toFixed(3)}: ${count(groups.length)} ` +
        `group${groups.length === 1 ? "" : "s"} of ${images(held)}`;
      box.replaceChildren(...groups.slice(0, PAGE).flatMap((list) => [
        element("h3", {}, images(list.length)), gallery(list, fileName)]));
      if (groups.length > PAGE) box.append(quiet(`The ${PAGE} largest groups are shown.`));
    };
    slider.addEventListener("input", draw);
    draw();
    return [heading("Near duplicates"), quiet("Groups of images whose cosine similarity to another " +
      "of the group is at least the threshold."), element("div", { className: "tools" },
      element("label", {}, "Threshold ", slider), text,
      tool("Select all but one of each", () => select(groups.flatMap((list) => list.slice(1))))), box];
  }
  function outliersView() {
    const k = data.neighbourCount;
    const near = everything.map((i) => cosines().subarray(i * k, i * k + k).reduce((a, b) => a + b, 0) / k);
    const list = everything.slice().sort((a, b) => near[a] - near[b]);
    return [heading("Outliers"), quiet(`Farthest from all others first: mean cosine similarity of the ${k} ` +
      "nearest images."), gallery(list, (i) => near[i].toFixed(3))];
  }
  function qualityView() {
    const light = numbers(data.light, Float32Array), sharp = numbers(data.sharpness, Float32Array);
    return [heading("Dark or blurred"), quiet("Light is the mean luminance; sharpness the variance of the " +
      "Laplacian over that of the image, at up to 512 px: a hint, as a calm sky has few edges too."),
    ...sorted(everything, {
      "darkest first": [(a, b) => light[a] - light[b], (i) => percent(light[i], 1)],
      "brightest first": [(a, b) => light[b] - light[a], (i) => percent(light[i], 1)],
      "most blurred first": [(a, b) => sharp[a] - sharp[b], (i) => sharp[i].toFixed(3)],
    })];
  }
  function selectedView() {
    const list = [...selected];
    return [heading(`${images(list.length)} selected`), gallery(list, (i) => tagsOf(i).join(", ") || null)];
  }

  function aboutView() {
    const rows = (pairs) => element("tbody", {}, ...pairs.map(([name, value]) => element("tr", {},
      element("th", { scope: "row" }, name), element("td", {}, value))));
    const file = element("input", { type: "file", accept: ".json", id: "import", onchange: () =>
      file.files[0]?.text().then(takeIn).catch(() => { status.textContent = said.textContent =
        "That is no export of this page."; }) });
    const said = element("p");
    const takeIn = (text) => {
      const groups = {};
      let known = 0;
      for (const row of JSON.parse(text)) {
        const i = numberOf().get(row.file);
        if (i === undefined) continue;
        known++;
        setTags(i, [...tagsOf(i), ...row.tags.map(String)]);
        for (const [key, name] of Object.entries(row)) {
          if (!key.startsWith("name_") || !name) continue;
          const note = { name: String(name), count: Number(key.slice(5)), files: [] };
          (groups[`${key} ${name}`] ||= note).files.push(row.file);
        }
      }
      const found = Object.values(groups).map((note) => ({ ...note, size: note.files.length }));
      homeless.push(...found.sort(byRank).reverse().filter((note) => !adopt(note, true)));
      keep();
      status.textContent = said.textContent = `Taken in: the names and tags of ${images(known)}.`;
    };
    const parts = [heading("About this page"), ...(data.note ? [element("p", {}, data.note)] : []),
      element("p", {}, "Clusters are C2BIN's: groups of images whose features, and those of their " +
        "random views and nearest neighbours, belong together, at several scales. An assignment is a " +
        "softmax: one near 1 says that the cluster is clear to the model, not that it is right. " +
        "Neighbours are the largest cosine similarities of standardised features."),
      element("h3", {}, "Keys"),
      element("p", {}, "Arrow keys move between images, Enter opens, x selects, / searches, + and − show " +
        "finer and coarser clusters. Shift-click selects all images in between. In an open image left and " +
        "right go on, Escape closes."),
      element("h3", {}, "Notes"),
      element("p", {}, "This browser keeps names of clusters, tags and the selection. Export them to keep " +
        "them elsewhere, and for c2bin-explore apply FILE, which copies or links images into folders."),
      element("div", { className: "tools" }, tool("Export all as CSV", () => exportRows(everything, "csv")),
        tool("Export all as JSON", () => exportRows(everything, "json")),
        element("label", {}, "Take in a JSON export ", file)), said,
      element("h3", {}, "Settings"),
      element("table", {}, rows([...Object.entries(data.settings), ["Map", data.mapMethod]])),
      element("h3", {}, "Scales")];
    const head = ["Clusters", "Hold images", "Effective (exp of entropy)"];
    if (scales[0].scores.nmi !== undefined) head.push("NMI", "ACC (one to one)", "Purity");
    const body = scales.map((scale) => {
      const s = scale.scores;
      const cells = [scale.count, s.in_use, s.effective.toFixed(1)];
      if (s.nmi !== undefined) cells.push(s.nmi.toFixed(3), s.acc.toFixed(3), s.purity.toFixed(3));
      return element("tr", {}, ...cells.map((cell) => element("td", {}, String(cell))));
    });
    parts.push(element("div", { className: "wide" }, element("table", {},
      element("thead", {}, element("tr", {}, ...head.map((h) => element("th", { scope: "col" }, h)))),
      element("tbody", {}, ...body))));
    parts.push(element("h3", {}, `Skipped: ${count(data.skippedCount)} file${data.skippedCount === 1 ? "" : "s"}`));
    if (data.skipped.length < data.skippedCount) {
      parts.push(element("p", {}, `The first ${count(data.skipped.length)}; all are in skipped.csv.`));
    }
    if (data.skipped.length) parts.push(element("table", { id: "skipped" }, rows(data.skipped)));
    return parts;
  }

  // Exports: a row an image, as c2bin-explore apply reads it.
  function exportRows(list, kind) {
    const rows = list.map((i) => ({ file: data.names[i], folder: folder.startsWith("file:") ? folder : "",
      taken: date(i)?.slice(0, 19) ?? "", label: labelName(i) ?? "", tags: tagsOf(i),
      ...Object.fromEntries(scales.flatMap((scale, s) => [[`cluster_${scale.count}`, scale.cluster[i]],
        [`name_${scale.count}`, ownName(s, scale.cluster[i])]])) }));
    let text = JSON.stringify(rows, null, 1);
    if (kind === "csv") {
      const cell = (value) => {
        let text = Array.isArray(value) ? value.join(";") : String(value);
        // A spreadsheet would read a formula; read_csv of c2bin_explore takes the quote away.
        if (/^[=+\-@\t\r']/.test(text)) text = `'${text}`;
        return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
      };
      text = [Object.keys(rows[0]), ...rows.map(Object.values)].map((row) => row.map(cell).join(",")).join("\n");
    }
    const link = element("a", { download: `selection.${kind}`,
      href: URL.createObjectURL(new Blob([text + "\n"], { type: "application/octet-stream" })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
  byId("tag").addEventListener("submit", (event) => {
    event.preventDefault();
    const tag = byId("tag-name").value.trim().replaceAll(";", ",");
    if (!tag) return;
    for (const i of selected) setTags(i, [...tagsOf(i), tag]);
    byId("tag-name").value = "";
    keep();
    status.textContent = `${images(selected.size)} tagged ${tag}`;
    if (main.dataset.view === "selected") draw(["selected"], true);
  });
  for (const kind of ["csv", "json"]) {
    byId(`export-${kind}`).addEventListener("click", () => exportRows([...selected], kind));
  }
  byId("clear").addEventListener("click", () => select([...selected], false));

  // One image
  function original(i) {
    if (!data.link) return null;
    return `${data.link}/${data.links[i] ?? data.names[i].split("/").map(encodeURIComponent).join("/")}`;
  }
  const step = (i, by) => {
    const at = around.indexOf(i);
    const next = around[at + by];
    if (at >= 0 && next !== undefined) location.hash = `#/image/${next}`;
  };
  let opened = -1;
  function showImage(i) {
    opened = i;
    const at = around.indexOf(i), link = original(i), facts = element("dl");
    const fact = (name, ...value) => facts.append(element("dt", {}, name), element("dd", {}, ...value));
    if (date(i)) fact("Taken", date(i).slice(0, 16).replace("T", " "));
    if (labelName(i) !== null) fact("Label", labelName(i));
    scales.forEach((scale, s) => fact(`Of ${scale.count}`,
      element("a", { href: hrefOf([[s, scale.cluster[i]]]) }, clusterName(s, scale.cluster[i])),
      ` (${fraction(scale.certainty[i])})`));
    const tags = element("input", { id: "tags", "aria-label": "Tags, separated by semicolons", value: tagsOf(i).join("; "), placeholder: "one; another",
      onchange: () => { setTags(i, tags.value.split(";").map((tag) => tag.trim()).filter(Boolean)); keep(); } });
    fact("Tags", tags);
    const links = [element("a", { href: `#/map/${i}` }, "On the map")];
    if (link) links.unshift(element("a", { href: link, target: "_blank", rel: "noopener" }, "Open the original"), " · ");
    fact("Show", ...links);
    const image = picture(i, data.names[i]), note = element("p", { className: "quiet" });
    const figure = element("figure", { className: "large" }, image);
    if (link) {
      const full = element("img", { alt: data.names[i], draggable: "false",
        onload: () => image.replaceWith(full),
        onerror: () => { note.textContent = "This is the thumbnail: the original is elsewhere now, or of a " +
          "format that this browser does not show."; } });
      full.src = link;
    }
    let from = null;
    figure.addEventListener("pointerdown", (event) => { from = event.clientX; });
    figure.addEventListener("pointerup", (event) => {
      const moved = event.clientX - from;
      if (from !== null && Math.abs(moved) > 50) step(i, moved < 0 ? 1 : -1);
      from = null;
    });
    const k = data.neighbourCount;
    const near = Array.from(neighbours().subarray(i * k, i * k + k));
    const cosine = new Map(near.map((j, r) => [j, cosines()[i * k + r]]));
    const chosen = element("span", { className: "tile" }, element("label", {},
      element("input", { type: "checkbox", value: i, onclick: () => choose(i, around, false) }), " Select"));
    detail.replaceChildren(
      element("div", { className: "tools bar" },
        tool("‹", () => step(i, -1), { "aria-label": "Previous image", disabled: at < 1 }),
        tool("›", () => step(i, 1), { "aria-label": "Next image", disabled: at < 0 || at === around.length - 1 }),
        chosen, tool("✕", () => detail.close(), { "aria-label": "Close", id: "close" })),
      figure, note,
      element("h2", { id: "detail-name", tabindex: "-1" }, data.names[i]), facts,
      element("h3", {}, "Nearest neighbours, by cosine similarity"),
      gallery(near, (j) => cosine.get(j).toFixed(3)));
    if (!detail.open) detail.showModal();
    detail.scrollTop = 0;
    byId("detail-name").focus({ preventScroll: true });
    showSelection();
  }
  detail.addEventListener("close", () => {
    if (!location.hash.startsWith("#/image/")) return;
    history.replaceState(null, "", lastView);
    const back = main.querySelector(`[data-image="${opened}"]`)?.closest("button");
    if (back) back.focus();
  });
  detail.addEventListener("click", (event) => { if (event.target === detail) detail.close(); });

  // The map
  function mapView(target) {
    const canvas = element("canvas", { tabindex: "0", role: "application",
      "aria-label": "Map of all images. Arrow keys move, plus and minus zoom, 0 shows all, " +
        "Enter opens the image at the cross." });
    const tip = element("div", { className: "tip", hidden: "", "aria-hidden": "true" });
    const choice = element("select", { id: "colour" });
    scales.forEach((scale, s) => choice.append(element("option", { value: s }, `${scale.count} clusters`)));
    if (data.classes.length) choice.append(element("option", { value: "label" }, "Label"));
    choice.value = scaleIndex;
    const legend = element("ul", { className: "legend" });
    const context = canvas.getContext("2d");
    const points = positions();
    const view = { zoom: 1, x: 0.5, y: 0.5 };
    let hovered = -1, scheduled = false, side = 1, width = 1, height = 1;
    const loaded = new Map();

    const screenX = (i) => (points[2 * i] - view.x) * side * view.zoom + width / 2;
    const screenY = (i) => (points[2 * i + 1] - view.y) * side * view.zoom + height / 2;
    const group = (i) => (choice.value === "label" ? labels[i] : scales[choice.value].cluster[i]);

    function resize() {
      const ratio = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
      width = box.width;
      height = box.height;
      side = Math.max(Math.min(width, height) - 40, 50);
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      schedule();
    }
    function schedule() {
      if (scheduled) return;
      scheduled = true;
      requestAnimationFrame(() => { scheduled = false; if (canvas.isConnected) draw(); });
    }
    function small(i) {
      if (!loaded.has(i)) {
        const source = thumbnail(i);
        if (!source) return null;
        if (loaded.size > 800) loaded.delete(loaded.keys().next().value);
        const image = new Image();
        image.onload = schedule;
        image.src = source;
        loaded.set(i, image);
      }
      const image = loaded.get(i);
      return image.complete && image.naturalWidth ? image : null;
    }
    // Pictures grow with the room that there is for each.
    const edge = () => Math.max(44, Math.min(160, (0.7 * side * view.zoom) / Math.sqrt(n)));
    function draw() {
      const style = getComputedStyle(document.documentElement), size = edge(), margin = size / 2 + 8;
      context.clearRect(0, 0, width, height);
      const groups = new Map();
      let visible = 0;
      for (let i = 0; i < n; i++) {
        const x = screenX(i), y = screenY(i);
        if (x < -margin || y < -margin || x > width + margin || y > height + margin) continue;
        visible++;
        const k = group(i);
        if (!groups.has(k)) groups.set(k, []);
        groups.get(k).push(i);
      }
      const pictures = visible <= Math.max(40, (width * height) / 2000);
      const least = Math.max(1.5, Math.min(4, 150 / Math.sqrt(n)));
      const radius = Math.min(5, least * Math.sqrt(Math.max(1, view.zoom)));
      for (const [k, list] of groups) {
        context.fillStyle = k < 0 ? style.getPropertyValue("--quiet") : colour(k);
        for (const i of list) {
          const x = screenX(i), y = screenY(i), image = pictures ? small(i) : null;
          if (image) {
            const fit = size / Math.max(image.naturalWidth, image.naturalHeight);
            const w = image.naturalWidth * fit, h = image.naturalHeight * fit;
            context.fillRect(x - w / 2 - 2, y - h / 2 - 2, w + 4, h + 4);
            context.drawImage(image, x - w / 2, y - h / 2, w, h);
          } else context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius);
        }
      }
      context.strokeStyle = style.getPropertyValue("--text");
      context.lineWidth = 2;
      if (hovered >= 0) {
        context.strokeRect(screenX(hovered) - 7, screenY(hovered) - 7, 14, 14);
      }
      if (canvas.matches(":focus-visible")) {
        context.beginPath();
        context.moveTo(width / 2 - 10, height / 2);
        context.lineTo(width / 2 + 10, height / 2);
        context.moveTo(width / 2, height / 2 - 10);
        context.lineTo(width / 2, height / 2 + 10);
        context.stroke();
      }
      canvas.dataset.visible = visible;
    }
    function nearest(x, y, reach) {
      let best = -1, least = reach * reach;
      for (let i = 0; i < n; i++) {
        const dx = screenX(i) - x, dy = screenY(i) - y, d = dx * dx + dy * dy;
        if (d < least) { least = d; best = i; }
      }
      return best;
    }
    function hover(i, announce) {
      if (i !== hovered) {
        hovered = i;
        tip.hidden = i < 0;
        if (i >= 0) {
          const parts = [data.names[i], ...(labelName(i) === null ? [] : [`label ${labelName(i)}`]),
            clusterName(scaleIndex, scales[scaleIndex].cluster[i])];
          const image = element("img", { alt: "", src: blank });
          fill(image, i);
          tip.replaceChildren(image, parts.join(", "));
          if (announce) status.textContent = parts.join(", ");
        }
        schedule();
      }
      if (i >= 0) {
        tip.style.left = `${Math.max(0, Math.min(screenX(i) + 14, width - tip.offsetWidth))}px`;
        const below = screenY(i) + 14;
        tip.style.top = `${below + tip.offsetHeight < height ? below : Math.max(0, screenY(i) - tip.offsetHeight - 14)}px`;
      }
    }
    function zoom(factor, x = width / 2, y = height / 2) {
      const before = view.zoom;
      view.zoom = Math.max(0.5, Math.min(400, view.zoom * factor));
      const shift = (1 / before - 1 / view.zoom) / side;
      view.x += (x - width / 2) * shift;
      view.y += (y - height / 2) * shift;
      schedule();
    }
    // To the pointer, the image that was told last, or else the one nearest to the middle.
    let pointer = null;
    function zoomHere(factor) {
      if (pointer) { zoom(factor, ...pointer); return; }
      const i = hovered >= 0 ? hovered : nearest(width / 2, height / 2, Infinity);
      Object.assign(view, { x: points[2 * i], y: points[2 * i + 1] });
      zoom(factor);
    }
    function home() { Object.assign(view, { zoom: 1, x: 0.5, y: 0.5 }); schedule(); }
    function move(dx, dy) {
      view.x += dx / (side * view.zoom);
      view.y += dy / (side * view.zoom);
      schedule();
    }
    function paintLegend() {
      const names = choice.value === "label" ? data.classes
        : range(scales[choice.value].count, (k) => clusterName(Number(choice.value), k));
      legend.replaceChildren(...(names.length > 32 ? [] : names.map((name, k) =>
        element("li", {}, swatch(k), name))));
      schedule();
    }
    choice.addEventListener("change", paintLegend);

    const pointers = new Map();
    let dragged = 0;
    const local = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, local(event));
      if (pointers.size === 1) dragged = 0;
    });
    canvas.addEventListener("pointermove", (event) => {
      const [x, y] = local(event), former = pointers.get(event.pointerId);
      if (event.pointerType === "mouse") pointer = [x, y];
      if (!former) { hover(nearest(x, y, edge() / 2), false); return; }
      dragged += Math.abs(x - former[0]) + Math.abs(y - former[1]);
      const share = pointers.size;
      if (share === 2) {
        const [other] = [...pointers].find(([id]) => id !== event.pointerId).slice(1);
        const distance = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
        zoom(distance([x, y]) / distance(former), (former[0] + other[0]) / 2, (former[1] + other[1]) / 2);
      }
      if (dragged > 4) { hover(-1, false); move((former[0] - x) / share, (former[1] - y) / share); }
      pointers.set(event.pointerId, [x, y]);
    });
    const release = (event) => pointers.delete(event.pointerId);
    canvas.addEventListener("pointerup", (event) => {
      const alone = pointers.size === 1;
      release(event);
      if (!alone || dragged > 4) return;
      const i = nearest(...local(event), edge() / 2);
      if (i >= 0) location.hash = `#/image/${i}`;
    });
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => { pointer = null; hover(-1, false); });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const step = event.deltaMode ? 30 : 1;
      zoom(Math.exp(-event.deltaY * step * 0.0015), ...local(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const acts = {
        ArrowLeft: () => move(-60, 0), ArrowRight: () => move(60, 0), ArrowUp: () => move(0, -60),
        ArrowDown: () => move(0, 60), "+": () => zoomHere(1.5), "=": () => zoomHere(1.5),
        "-": () => zoomHere(1 / 1.5), 0: home,
        Enter: () => { const i = nearest(width / 2, height / 2, Infinity); if (i >= 0) location.hash = `#/image/${i}`; },
      };
      const act = acts[event.key];
      if (!act) return;
      event.preventDefault();
      act();
      if (!pointer && event.key !== "Enter") hover(nearest(width / 2, height / 2, 200), true);
    });
    for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, schedule);

    const sizes = new ResizeObserver(resize);
    sizes.observe(canvas);
    paintLegend();
    // After layout, for the cross of a target needs the size.
    requestAnimationFrame(() => {
      resize();
      if (target >= 0 && target < n) {
        Object.assign(view, { zoom: 12, x: points[2 * target], y: points[2 * target + 1] });
        hover(target, true);
      }
    });
    return [heading("Map"),
      element("p", { className: "quiet" }, "Images that look alike to the model lie close together; " +
        "distances between far groups mean little. Click a point for its neighbours."),
      element("div", { className: "tools" }, element("label", { for: "colour" }, "Colour by"), choice,
        tool("+", () => zoomHere(1.5), { "aria-label": "Zoom in" }),
        tool("−", () => zoomHere(1 / 1.5), { "aria-label": "Zoom out" }), tool("Show all", home)),
      element("div", { className: "map" }, canvas, tip), legend];
  }

  // Routes
  function route(first = false) {
    const [, name = "clusters", ...rest] = location.hash.split("/");
    if (name === "image") {
      const i = Number(rest[0]);
      if (Number.isInteger(i) && i >= 0 && i < n) {
        if (!main.dataset.view) draw(["clusters"], true);
        showImage(i);
        return;
      }
    }
    if (detail.open) { history.replaceState(null, "", location.hash); detail.close(); }
    if (location.hash === lastView && main.dataset.view) return;
    draw([name, ...rest], first);
  }
  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }
  function draw([name, ...rest], first) {
    const views = {
      clusters: () => clustersView(...rest),
      map: () => mapView(rest.length ? Number(rest[0]) : -1),
      time: () => timeView(rest[0]),
      duplicates: duplicatesView,
      outliers: outliersView,
      quality: qualityView,
      search: () => searchView(decoded(rest.join("/"))),
      selected: selectedView,
      about: aboutView,
    };
    const known = Object.hasOwn(views, name) ? name : "clusters";
    lastView = known === name ? location.hash : "#/clusters";
    if (lastView.startsWith("#/image/")) lastView = "#/clusters";
    watcher.disconnect();
    waiting = [];
    main.dataset.view = known;
    main.replaceChildren(...(known === "about" || !data.note ? [] :
      [element("p", { className: "note" }, data.note)]), ...views[known]());
    if (known !== "search" && byId("query") !== document.activeElement) byId("query").value = "";
    for (const link of document.querySelectorAll("#views a")) {
      if (link.dataset.view !== known) { link.removeAttribute("aria-current"); continue; }
      link.setAttribute("aria-current", "page");
      const box = link.parentElement;
      box.scrollLeft = link.offsetLeft - box.offsetLeft - (box.clientWidth - link.offsetWidth) / 2;
    }
    for (const radio of document.querySelectorAll("#scales input")) {
      radio.checked = Number(radio.value) === scaleIndex;
    }
    if (!first && document.activeElement !== byId("query")) {
      window.scrollTo(0, 0);
      const title = main.querySelector("h2");
      if (title) title.focus({ preventScroll: true });
    }
  }

  function setScale(s) {
    scaleIndex = s;
    const colourChoice = byId("colour");
    if (main.dataset.view === "map" && colourChoice) {
      colourChoice.value = s;
      colourChoice.dispatchEvent(new Event("change"));
    } else if (location.hash === "#/clusters" || !location.hash) draw(["clusters"], true);
    else { lastView = ""; location.hash = "#/clusters"; }
  }
  if (scales.length < 2) byId("scales").remove();
  else scales.forEach((scale, s) => byId("scales").append(element("label", {},
    element("input", { type: "radio", name: "scale", value: s, onchange: () => setScale(s) }),
    String(scale.count))));

  // Keys: those of a text field or a map are its own.
  document.addEventListener("keydown", (event) => {
    const at = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (at.matches("input:not([type=checkbox]), select, textarea, canvas")) return;
    const key = event.key, item = at.closest(".tile");
    const acts = {
      "/": () => byId("query").focus(),
      x: () => (detail.open && !item?.choose ? choose(opened, around, false) : item?.choose?.(false)),
      X: () => item?.choose?.(true),
    };
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    if (detail.open) {
      delete acts["/"];
      if (arrow?.[0]) acts[key] = () => step(opened, arrow[0]);
    } else if (arrow && at.matches(".image, .card > a")) acts[key] = () => moveFocus(at, ...arrow);
    else if (arrow && arrow[0] + arrow[1] > 0 && at.matches("h2")) {
      acts[key] = () => main.querySelector(".image, .card > a")?.focus();
    } else if (main.dataset.view === "clusters" && "+=-".includes(key) && key) {
      const s = scaleIndex + (key === "-" ? -1 : 1);
      if (scales[s]) acts[key] = () => setScale(s);
    }
    if (!acts[key]) return;
    event.preventDefault();
    acts[key]();
  });
  function moveFocus(from, dx, dy) {
    const all = [...main.querySelectorAll(".image, .card > a")], here = from.getBoundingClientRect();
    let next = all[all.indexOf(from) + dx];
    if (dy) {
      let least = Infinity;
      for (const other of all) {
        const box = other.getBoundingClientRect(), down = (box.top - here.top) * dy;
        const far = 1e4 * Math.round(down) + Math.abs(box.left - here.left);
        if (down > 4 && far < least) { least = far; next = other; }
      }
    }
    next?.focus();
  }

  let typing;
  byId("query").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      const hash = `#/search/${encodeURIComponent(event.target.value.trim())}`;
      if (location.hash.startsWith("#/search/")) { history.replaceState(null, "", hash); route(); }
      else location.hash = hash;
    }, 150);
  });
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(typing);
    location.hash = `#/search/${encodeURIComponent(byId("query").value.trim())}`;
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  window.addEventListener("hashchange", () => route());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (main.dataset.view) draw(lastView.slice(2).split("/"), true);
  });
  route(true);
  showSelection();
})();
