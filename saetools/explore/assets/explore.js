"use strict";
// What is chosen in a select element goes to the store that it names.
document.addEventListener("change", (event) => {
  const store = event.target.dataset && event.target.dataset.store;
  if (store) window.dash_clientside.set_props(store, { data: event.target.value });
});
// Links lead to other pages without loading all scripts again; what opens in another tab is left to the browser.
document.addEventListener("click", (event) => {
  const link = event.target.closest && event.target.closest("a[href^='/']");
  const elsewhere = event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey;
  if (!link || elsewhere || event.defaultPrevented) return;
  event.preventDefault();
  window.dash_clientside.set_props("address", { href: link.getAttribute("href") });
  window.scrollTo(0, 0);
  document.getElementById("page").focus({ preventScroll: true });
});
// A link to a latent, from the grid and from dots of a figure; keyboard focus and the current page follow the address.
window.dashAgGridComponentFunctions = Object.assign(window.dashAgGridComponentFunctions || {}, {
  LatentLink: (props) => React.createElement("a", { href: `/latent/${Number(props.value)}` }, String(props.value ?? "")),
});
window.dash_clientside = Object.assign({}, window.dash_clientside, {
  saetools: {
    open: (click) => {
      const latent = click && click.points && click.points[0] && click.points[0].customdata;
      return Number.isInteger(latent) ? `/latent/${latent}` : window.dash_clientside.no_update;
    },
    same: (value) => String(value),
    arrive: (path) => {
      for (const link of document.querySelectorAll("#pages a")) {
        if (link.getAttribute("href") === path) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
      return path;
    },
  },
});
