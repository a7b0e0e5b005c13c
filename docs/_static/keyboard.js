// What scrolls sideways is reached by the keyboard, in every browser.
addEventListener("DOMContentLoaded", () => document.querySelectorAll("pre, .table-wrapper").forEach(each => each.tabIndex = 0));
