// The widget manager asks for mathematics the way MathJax 2 wanted it; answer with MathJax 3.
const loaded = new Promise((done) => window.addEventListener("load", done));
const Hub = {
  Queue: ([, , element]) => loaded.then(() => MathJax.startup.promise).then(() => MathJax.typesetPromise([element])),
};
let current; // MathJax 3 sets window.MathJax twice: its configuration, then itself
const set = (value) => (current = value && Object.assign(value, { Hub }));
set(window.MathJax);
Object.defineProperty(window, "MathJax", { get: () => current, set });
