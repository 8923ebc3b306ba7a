// Charts are drawn on canvases, which know nothing of style sheets: they are given the page's colours here, at first
// and whenever light and dark change. The button overrules what the system prefers.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  function paint() {
    const css = getComputedStyle(root);
    const [text, soft, grid] = ["--text", "--soft", "--grid"].map((name) => css.getPropertyValue(name).trim());
    for (const shown of Bokeh.documents) {
      for (const model of shown._all_models.values()) {
        if (model.tags && model.tags.includes("own-colour")) continue;
        for (const name of Object.keys(model.properties)) {
          if (name === "text_color" || name.endsWith("label_text_color")) model[name] = text;
          else if (name === "axis_line_color" || name.endsWith("tick_line_color")) {
            if (model[name] !== null) model[name] = soft;
          } else if (name === "grid_line_color" && model[name] !== null) model[name] = grid;
        }
      }
    }
    document.getElementById("theme").textContent = isDark() ? "Light" : "Dark";
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    paint();
  });
  system.addEventListener("change", paint);

  for (const key of document.querySelectorAll("button.key")) {
    key.addEventListener("click", () => {
      const shown = Bokeh.documents.map((one) => one.get_model_by_id(key.dataset.renderer)).find((model) => model);
      shown.visible = !shown.visible;
      key.setAttribute("aria-pressed", String(shown.visible));
    });
  }
  const wait = () => (Bokeh.documents.length ? paint() : setTimeout(wait, 10));
  wait();
})();
