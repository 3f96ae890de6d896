"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("numbers").textContent);
  const root = document.documentElement;
  const note = document.getElementById("no-charts");
  const chartOf = (name) => document.querySelector(`.chart[data-figure="${name}"]`);
  const PRINT_WIDTH = 660;
  let printing = false;

  // --- colours: "@name" stands for the page's --name ---------------------------------------------
  const WORDS = ["text", "ticktext", "name"]; // a token or a prompt may start with "@" too
  function coloured(value, style) {
    if (typeof value === "string") {
      return value.startsWith("@") ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    }
    if (Array.isArray(value)) return typeof value[0] === "object" || value.length === 2 ? value.map((v) => coloured(v, style)) : value;
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, WORDS.includes(k) ? v : coloured(v, style)]));
    }
    return value;
  }

  function axis(settings, style, narrow) {
    return {
      automargin: true, gridcolor: "@grid", zerolinecolor: "@grid", linecolor: "@muted", ticks: "outside",
      tickcolor: "@grid", fixedrange: true, ...settings,
      ...(settings && settings.ticktext && narrow ? { tickfont: { size: 10 } } : {}),
    };
  }

  // --- drawing -----------------------------------------------------------------------------------
  function draw(name) {
    const element = chartOf(name), figure = figures[name];
    if (!element) return;
    const style = getComputedStyle(root);
    const frame = figure.frames[figure.shown];
    const room = printing ? (element.closest(".grid") ? PRINT_WIDTH / 2 - 30 : PRINT_WIDTH - 30) : element.clientWidth;
    const narrow = room < 520;
    const data = figure.data.map((trace, i) => ({ ...trace, ...(frame ? frame.data[i] : {}) }));
    const settings = { ...figure.layout, ...(frame ? frame.layout : {}) };
    const ticks = (settings.xaxis && settings.xaxis.ticktext) || [];
    const width = room, most = Math.max(1, Math.floor((room - 130) / 15));
    if (narrow && ticks.length > most) { // every so many labels: the whole chart stays in sight
      const step = Math.ceil(ticks.length / most), thin = (values) => values.filter((_, i) => i % step === 0);
      settings.xaxis = { ...settings.xaxis, ticktext: thin(ticks), tickvals: thin(settings.xaxis.tickvals) };
    }
    const least = printing ? (ticks.length ? 300 : 200) : narrow ? 320 : 280;
    const height = Math.round(Math.max(least, Math.min(printing ? (ticks.length ? 330 : 235) : 560, room * figure.ratio)));
    for (const trace of data) {
      if (trace.type === "heatmap" && narrow && !ticks.length) {
        trace.colorbar = { ...trace.colorbar, orientation: "h", y: -0.3, yanchor: "top", thickness: 8, len: 0.9 };
      }
    }
    const layout = {
      ...settings, width, height,
      xaxis: axis(settings.xaxis, style, narrow), yaxis: axis(settings.yaxis, style, narrow),
      margin: { l: 48, r: 12, t: 34, b: 44 }, dragmode: false, hovermode: "closest",
      paper_bgcolor: "@paper", plot_bgcolor: "@paper",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 12 : 13, color: "@ink" },
      showlegend: data.filter((t) => t.type === "scatter").length > 1,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: "@paper", bordercolor: "@muted", font: { color: "@ink" } },
    };
    const config = {
      displayModeBar: false, scrollZoom: false, doubleClick: false, showTips: false,
    };
    Plotly.react(element, coloured(data, style), coloured(layout, style), config);
  }
  const drawAll = () => Object.keys(figures).forEach(draw);

  function show(name, index) {
    const figure = figures[name];
    figure.shown = index;
    const frame = figure.frames[index], control = document.querySelector(`[data-frames="${name}"]`);
    control.value = String(index);
    document.getElementById("caption-" + name).textContent = frame.summary;
    if (control.type === "range") {
      control.setAttribute("aria-valuetext", frame.label);
      control.parentElement.querySelector("output").textContent = frame.label;
    }
    draw(name);
    for (const [other, picker] of Object.entries(figures)) {
      if (picker.picks === name) {
        Object.assign(picker.data[0], { selectedpoints: [index], unselected: { marker: { opacity: 0.4 } } });
        draw(other);
      }
    }
  }

  function connect() {
    for (const control of document.querySelectorAll("[data-frames]")) {
      control.addEventListener("input", () => show(control.dataset.frames, Number(control.value)));
    }
    for (const [name, figure] of Object.entries(figures)) {
      if (!figure.picks || !figures[figure.picks] || !chartOf(name)) continue;
      chartOf(name).on("plotly_click", (event) => {
        const point = event.points.find((p) => p.curveNumber === 0);
        if (point) show(figure.picks, point.pointNumber);
      });
      chartOf(name).classList.add("clickable");
    }
    new ResizeObserver(debounced(() => printing || drawAll())).observe(document.querySelector("main"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    addEventListener("beforeprint", () => forPrint(true));
    addEventListener("afterprint", () => forPrint(false));
  }

  function debounced(act) {
    let timer;
    let width = document.querySelector("main").clientWidth;
    return () => {
      const now = document.querySelector("main").clientWidth;
      if (now === width) return; // only height changed: something was unfolded
      width = now;
      clearTimeout(timer);
      timer = setTimeout(act, 120);
    };
  }

  // --- light on paper ----------------------------------------------------------------------------
  let before;
  function forPrint(on) {
    if (on === printing) return;
    printing = on;
    if (on) { before = root.dataset.theme; root.dataset.theme = "light"; }
    else if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    drawAll();
  }

  // --- theme -------------------------------------------------------------------------------------
  const themes = [["", "as the system"], ["light", "light"], ["dark", "dark"]];
  const button = document.getElementById("theme");
  button.hidden = false;
  let theme = 0;
  button.addEventListener("click", () => {
    theme = (theme + 1) % themes.length;
    const [value, label] = themes[theme];
    if (value) root.dataset.theme = value; else delete root.dataset.theme;
    button.textContent = "Theme: " + label;
    if (window.Plotly) drawAll();
  });

  // --- commands to copy --------------------------------------------------------------------------
  for (const copy of document.querySelectorAll(".copy")) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(copy.previousElementSibling.textContent);
      copy.textContent = "Copied";
    });
  }

  // --- plotly, unpacked here: nothing is fetched -------------------------------------------------
  async function unpack() {
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  if (typeof DecompressionStream === "undefined") {
    note.textContent = "This browser can't unpack the charts (no DecompressionStream). Every number drawn is in the tables.";
    return;
  }
  note.textContent = "Drawing the charts…";
  unpack().then(() => {
    drawAll();
    connect();
    note.remove();
    root.dataset.drawn = "yes";
  }).catch((error) => {
    note.textContent = "The charts can't be drawn: " + error.message + ". Every number is in the tables.";
    throw error;
  });
})();
