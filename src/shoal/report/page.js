// Embeds the charts and gives them the page's colours, again when the reader's scheme changes.
(() => {
  "use strict";
  Bokeh.set_log_level("warn");
  const root = getComputedStyle(document.documentElement);
  const color = (name) => root.getPropertyValue(name).trim();
  // A finger that drags a chart means to scroll the page.
  const touch = matchMedia("(pointer: coarse)").matches;

  const dress = (model) => {
    const ink = color("--ink");
    const soft = color("--soft");
    const line = color("--line");
    switch (model.type) {
      case "Title":
        model.text_color = ink;
        break;
      case "Legend":
        model.label_text_color = soft;
        break;
      case "LinearAxis":
        model.setv({
          axis_label_text_color: soft,
          major_label_text_color: soft,
          axis_line_color: line,
          major_tick_line_color: line,
        });
        break;
      case "Grid":
        if (model.grid_line_color !== null) model.grid_line_color = line;
        break;
      case "Toolbar":
        if (touch) model.autohide = false;
        break;
    }
  };

  const undrag = (model) => {
    if (model.type === "BoxZoomTool") model.active = false;
  };

  const roots = [];
  const dressAll = () => {
    for (const plot of roots) for (const model of plot.references()) dress(model);
  };
  const items = JSON.parse(document.getElementById("chart-data").textContent);
  for (const item of items) {
    Bokeh.embed.embed_item(item).then((views) => {
      for (const view of views) {
        roots.push(view.model);
        if (touch) view.model.references().forEach(undrag);
      }
      dressAll();
      document.getElementById(item.target_id).removeAttribute("aria-busy");
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dressAll);
})();
