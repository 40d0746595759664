"use strict";
(() => {
  const PAGE = 120, SHOWN = 24, TYPICAL = 6;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const n = data.names.length;
  const main = byId("main"), detail = byId("detail"), status = byId("status");

  // Every text of the data reaches the page through here, so none of it is ever read as HTML.
  function element(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "className") node.className = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }

  function numbers(text, type) {
    const binary = atob(text), bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new type(bytes.buffer);
  }

  function once(make) {
    let value;
    return () => (value === undefined ? (value = make()) : value);
  }

  const labels = numbers(data.labels, Int32Array);
  const place = numbers(data.place, Uint32Array);
  const neighbours = once(() => numbers(data.neighbours, Uint32Array));
  const cosines = once(() => numbers(data.cosines, Float32Array));
  const positions = once(() => numbers(data.positions, Float32Array));
  const scales = data.scales.map((scale) => {
    const cluster = numbers(scale.cluster, Uint16Array);
    const certainty = numbers(scale.certainty, Float32Array);
    const members = once(() => {
      const lists = Array.from({ length: scale.count }, () => []);
      for (let i = 0; i < n; i++) lists[cluster[i]].push(i);
      for (const list of lists) list.sort((a, b) => certainty[b] - certainty[a] || a - b);
      return lists;
    });
    return { ...scale, cluster, certainty, members };
  });
  const count = (value) => value.toLocaleString("en");
  const images = (value) => `${count(value)} image${value === 1 ? "" : "s"}`;
  const percent = (part, whole) => `${Math.round((100 * part) / whole)}\u00a0%`;
  const title = (scale) => scale.name[0].toUpperCase() + scale.name.slice(1);
  const fraction = (value) => (value > 0.9995 && value < 1 ? "> 0.999" : value.toFixed(3));
  const colour = (k) => {
    const light = getComputedStyle(document.documentElement).getPropertyValue("--point-light");
    return `oklch(${light.trim()} ${0.15 - 0.03 * (k % 3)} ${((k * 137.508) % 360).toFixed(1)})`;
  };
  const labelName = (i) => (labels[i] < 0 ? null : data.classes[labels[i]]);

  // Thumbnails: chunks follow this script in the file, so one may not be there yet.
  const chunks = new Map();
  function thumbnail(i) {
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

  // Images get their source when they come near the screen.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      fill(entry.target, Number(entry.target.dataset.image));
    }
  }, { rootMargin: "300px" });

  const blank = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7";
  function picture(i, alt = "") {
    const image = element("img", { alt, src: blank, "data-image": i, draggable: "false" });
    watcher.observe(image);
    return image;
  }
  function imageButton(i, caption = null) {
    const button = element("button", { type: "button", className: "image", title: data.names[i],
      "aria-label": caption ? `${data.names[i]}, ${caption}` : data.names[i],
      onclick: () => { location.hash = `#/image/${i}`; } }, picture(i));
    if (caption) button.append(element("span", { "aria-hidden": "true" }, caption));
    return button;
  }
  function gallery(list, caption = () => null) {
    const grid = element("ul", { className: "images" });
    grid.append(...list.map((i) => element("li", {}, imageButton(i, caption(i)))));
    return grid;
  }
  // A long list grows by a page at a time, so that the browser never holds what nobody looks at.
  function longGallery(list, caption = () => null) {
    const box = element("div"), grid = gallery(list.slice(0, PAGE), caption);
    box.append(grid);
    if (list.length <= PAGE) return box;
    let drawn = PAGE;
    const text = () => `Show ${count(Math.min(PAGE * 2, list.length - drawn))} more ` +
      `(${count(drawn)} of ${count(list.length)} are shown)`;
    const more = element("button", { type: "button", className: "tool", onclick: () => {
      const next = list.slice(drawn, drawn + PAGE * 2);
      const items = next.map((i) => element("li", {}, imageButton(i, caption(i))));
      grid.append(...items);
      drawn += next.length;
      items[0].firstChild.focus();
      if (drawn < list.length) more.textContent = text();
      else more.remove();
    } }, text());
    box.append(more);
    return box;
  }

  function mix(list) {
    if (!data.classes.length || !list.length) return null;
    const counts = new Map();
    for (const i of list) counts.set(labels[i], (counts.get(labels[i]) || 0) + 1);
    const sorted = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const items = sorted.slice(0, 4).map(([label, size]) => element("li", {},
      `${label < 0 ? "no label" : data.classes[label]} ${percent(size, list.length)}`));
    if (sorted.length > 4) items.push(element("li", {}, `${sorted.length - 4} more`));
    return element("ul", { className: "mix", "aria-label": "Labels" }, ...items);
  }
  function swatch(k) {
    const node = element("span", { className: "swatch", "aria-hidden": "true" });
    node.style.background = colour(k);
    return node;
  }
  function card(s, k, list, whole = null) {
    const size = whole ? `${images(list.length)}, ${percent(list.length, whole)}` : images(list.length);
    return element("li", { className: "card" },
      element("h3", {}, swatch(k), element("a", { href: `#/cluster/${s}/${k}` }, `Cluster ${k}`)),
      element("p", { className: "quiet" }, size),
      gallery(list.slice(0, TYPICAL)), mix(list));
  }
  function bySize(lists) {
    return lists.map((list, k) => [k, list]).filter(([, list]) => list.length)
      .sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
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

  let scaleIndex = 0;
  let lastView = "#/clusters";
  const heading = (text) => element("h2", { tabindex: "-1" }, text);

  function clustersView() {
    const scale = scales[scaleIndex];
    const lists = bySize(scale.members());
    return [heading(`${title(scale)} clusters`), element("p", { className: "quiet" }, scoreText(scale)),
      element("ul", { className: "cards" }, ...lists.map(([k, list]) => card(scaleIndex, k, list)))];
  }

  function clusterView(s, k) {
    const scale = scales[s];
    if (!scale || !(k >= 0 && k < scale.count)) return missing("There is no such cluster.");
    scaleIndex = s;
    const list = scale.members()[k];
    const parts = [heading(`${title(scale)} cluster ${k}`)];
    parts.push(element("p", {}, swatch(k), ` ${images(list.length)}, ${percent(list.length, n)} of all.`));
    if (!list.length) return parts;
    const composition = mix(list);
    if (composition) parts.push(composition);
    const certainty = (i) => fraction(scale.certainty[i]);
    parts.push(element("h3", {}, "Most typical"),
      element("p", { className: "quiet" }, "Largest assignment to this cluster, from 0 to 1."),
      gallery(list.slice(0, Math.min(SHOWN, Math.ceil(list.length / 2))), certainty));
    if (list.length > 1) {
      parts.push(element("h3", {}, "Least certain"),
        element("p", { className: "quiet" }, "In this cluster, but with the smallest assignment."),
        gallery(list.slice(-Math.min(SHOWN, Math.floor(list.length / 2))).reverse(), certainty));
    }
    for (const [other, word] of [[s + 1, "Finer"], [s - 1, "Coarser"]]) {
      const next = scales[other];
      if (!next) continue;
      const groups = Array.from({ length: next.count }, () => []);
      for (const i of list) groups[next.cluster[i]].push(i);
      const found = bySize(groups).slice(0, 12);
      parts.push(element("h3", {}, `${word} clusters of these images`), element("ul",
        { className: "cards" }, ...found.map(([j, part]) => card(other, j, part, list.length))));
    }
    parts.push(element("h3", {}, `All ${images(list.length)}`), longGallery(list, certainty));
    return parts;
  }

  function searchView(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (let i = 0; i < n; i++) {
      const name = data.names[i].toLowerCase();
      if (words.every((word) => name.includes(word))) found.push(i);
    }
    const text = words.length ? `${images(found.length)} whose name has “${query}”` : `All ${images(n)}`;
    status.textContent = text;
    if (byId("query") !== document.activeElement) byId("query").value = query;
    return [heading(text), longGallery(found, (i) => data.names[i].split(/[\\/]/).pop())];
  }

  function aboutView() {
    const rows = (pairs) => element("tbody", {}, ...pairs.map(([name, value]) => element("tr", {},
      element("th", { scope: "row" }, name), element("td", {}, value))));
    const parts = [heading("About this page"),
      element("p", {}, "Clusters and neighbours are C2BIN's. Trained without labels, it learns " +
        "features that stay alike between random views of an image, and clusters of three sizes " +
        "whose members agree between views. A training as short as this one finds colour, texture " +
        "and rough shape sooner than objects: take them as a way to look around, not as truth."),
      element("p", {}, "An assignment is a softmax: one near 1 says that the cluster is clear to the " +
        "model, not that it is right. Neighbours are the largest cosine similarities of backbone features."),
      element("h3", {}, "Settings"),
      element("table", {}, rows([...Object.entries(data.settings), ["Map", data.mapMethod]])),
      element("h3", {}, "Scales")];
    const head = ["Scale", "Clusters", "Hold images", "Effective (exp of entropy)"];
    if (scales[0].scores.nmi !== undefined) head.push("NMI", "ACC (one to one)", "Purity");
    const body = scales.map((scale) => {
      const s = scale.scores;
      const cells = [title(scale), scale.count, s.in_use, s.effective.toFixed(1)];
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

  const missing = (text) => [heading("Not found"), element("p", {}, text)];

  function original(i) {
    if (!data.link) return null;
    const path = data.links[i] ??
      data.names[i].split(/[\\/]/).map(encodeURIComponent).join("/");
    return `${data.link}/${path}`;
  }

  function showImage(i) {
    const facts = element("dl");
    const fact = (name, ...value) => facts.append(element("dt", {}, name), element("dd", {}, ...value));
    if (labelName(i) !== null) fact("Label", labelName(i));
    scales.forEach((scale, s) => fact(title(scale),
      element("a", { href: `#/cluster/${s}/${scale.cluster[i]}` }, `Cluster ${scale.cluster[i]}`),
      `, assignment ${fraction(scale.certainty[i])}`));
    const link = original(i);
    if (link) fact("File", element("a", { href: link, target: "_blank", rel: "noopener" }, "Open the original"));
    fact("Map", element("a", { href: `#/map/${i}` }, "Show on the map"));
    const k = data.neighbourCount;
    const near = Array.from(neighbours().subarray(i * k, i * k + k));
    const cosine = new Map(near.map((j, r) => [j, cosines()[i * k + r]]));
    detail.replaceChildren(
      element("button", { type: "button", className: "tool close", "aria-label": "Close",
        onclick: () => detail.close() }, "✕"),
      element("h2", { id: "detail-name", tabindex: "-1" }, data.names[i]),
      element("div", { className: "facts" }, picture(i, data.names[i]), facts),
      element("h3", {}, "Nearest neighbours, by cosine similarity"),
      gallery(near, (j) => cosine.get(j).toFixed(3)));
    if (!detail.open) detail.showModal();
    detail.scrollTop = 0;
    byId("detail-name").focus();
  }
  detail.addEventListener("close", () => {
    if (location.hash.startsWith("#/image/")) history.replaceState(null, "", lastView);
  });
  detail.addEventListener("click", (event) => { if (event.target === detail) detail.close(); });

  // The map
  function mapView(target) {
    const canvas = element("canvas", { tabindex: "0", role: "application",
      "aria-label": "Map of all images. Arrow keys move, plus and minus zoom, 0 shows all, " +
        "Enter opens the image at the cross." });
    const tip = element("div", { className: "tip", hidden: "", "aria-hidden": "true" });
    const choice = element("select", { id: "colour" });
    scales.forEach((scale, s) => choice.append(element("option", { value: s }, `${title(scale)} cluster`)));
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
    function draw() {
      const style = getComputedStyle(document.documentElement);
      context.clearRect(0, 0, width, height);
      const groups = new Map();
      let visible = 0;
      for (let i = 0; i < n; i++) {
        const x = screenX(i), y = screenY(i);
        if (x < -30 || y < -30 || x > width + 30 || y > height + 30) continue;
        visible++;
        const k = group(i);
        if (!groups.has(k)) groups.set(k, []);
        groups.get(k).push(i);
      }
      const pictures = visible <= Math.max(40, (width * height) / 2000);
      const least = Math.max(1.5, Math.min(4, 150 / Math.sqrt(n)));
      const radius = Math.min(5, least * Math.sqrt(Math.max(1, view.zoom))), edge = 44;
      for (const [k, list] of groups) {
        context.fillStyle = k < 0 ? style.getPropertyValue("--quiet") : colour(k);
        for (const i of list) {
          const x = screenX(i), y = screenY(i), image = pictures ? small(i) : null;
          if (image) {
            const fit = edge / Math.max(image.naturalWidth, image.naturalHeight);
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
            `${scales[scaleIndex].name} cluster ${scales[scaleIndex].cluster[i]}`];
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
    function home() { Object.assign(view, { zoom: 1, x: 0.5, y: 0.5 }); schedule(); }
    function move(dx, dy) {
      view.x += dx / (side * view.zoom);
      view.y += dy / (side * view.zoom);
      schedule();
    }
    function paintLegend() {
      const names = choice.value === "label" ? data.classes
        : Array.from({ length: scales[choice.value].count }, (_, k) => `Cluster ${k}`);
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
      if (!former) { hover(nearest(x, y, 24), false); return; }
      dragged += Math.abs(x - former[0]) + Math.abs(y - former[1]);
      const share = pointers.size;
      if (share === 2) {
        const [other] = [...pointers].find(([id]) => id !== event.pointerId).slice(1);
        const distance = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
        zoom(distance([x, y]) / distance(former), (x + other[0]) / 2, (y + other[1]) / 2);
      }
      if (dragged > 4) { hover(-1, false); move((former[0] - x) / share, (former[1] - y) / share); }
      pointers.set(event.pointerId, [x, y]);
    });
    const release = (event) => pointers.delete(event.pointerId);
    canvas.addEventListener("pointerup", (event) => {
      const alone = pointers.size === 1;
      release(event);
      if (!alone || dragged > 4) return;
      const i = nearest(...local(event), 24);
      if (i >= 0) location.hash = `#/image/${i}`;
    });
    canvas.addEventListener("pointercancel", release);
    canvas.addEventListener("pointerleave", () => hover(-1, false));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const step = event.deltaMode ? 30 : 1;
      zoom(Math.exp(-event.deltaY * step * 0.0015), ...local(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const acts = {
        ArrowLeft: () => move(-60, 0), ArrowRight: () => move(60, 0), ArrowUp: () => move(0, -60),
        ArrowDown: () => move(0, 60), "+": () => zoom(1.5), "=": () => zoom(1.5),
        "-": () => zoom(1 / 1.5), 0: home,
        Enter: () => { const i = nearest(width / 2, height / 2, Infinity); if (i >= 0) location.hash = `#/image/${i}`; },
      };
      const act = acts[event.key];
      if (!act) return;
      event.preventDefault();
      act();
      if (event.key !== "Enter") hover(nearest(width / 2, height / 2, 200), true);
    });
    for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, schedule);

    const tool = (text, label, act) => element("button",
      { type: "button", className: "tool", "aria-label": label, onclick: act }, text);
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
        tool("+", "Zoom in", () => zoom(1.5)), tool("−", "Zoom out", () => zoom(1 / 1.5)),
        tool("Show all", "Show all", home)),
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
  function draw([name, ...rest], first) {
    const views = {
      clusters: clustersView,
      cluster: () => clusterView(Number(rest[0]), Number(rest[1])),
      map: () => mapView(rest.length ? Number(rest[0]) : -1),
      search: () => searchView(decodeURIComponent(rest.join("/"))),
      about: aboutView,
    };
    const known = Object.hasOwn(views, name) ? name : "clusters";
    lastView = known === name ? location.hash : "#/clusters";
    if (lastView.startsWith("#/image/")) lastView = "#/clusters";
    watcher.disconnect();
    waiting = [];
    main.replaceChildren(...views[known]());
    main.dataset.view = known;
    if (known !== "search" && byId("query") !== document.activeElement) byId("query").value = "";
    for (const link of document.querySelectorAll("nav a")) {
      const here = link.dataset.view === (known === "cluster" ? "clusters" : known);
      if (here) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
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

  scales.forEach((scale, s) => byId("scales").append(element("label", {},
    element("input", { type: "radio", name: "scale", value: s, onchange: () => {
      scaleIndex = s;
      const colourChoice = byId("colour");
      if (main.dataset.view === "map" && colourChoice) {
        colourChoice.value = s;
        colourChoice.dispatchEvent(new Event("change"));
      } else if (location.hash === "#/clusters" || !location.hash) draw(["clusters"], true);
      else { lastView = ""; location.hash = "#/clusters"; }
    } }), `${title(scale)} (${scale.count})`)));
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
})();
