// Which dump is shown: chosen by slider, chart, arrow keys, or `#dump=2` in the address.
const all = query => [...document.querySelectorAll(query)];
const slider = document.querySelector('.steer input');
const count = new Set(all('section[data-d]').map(part => part.dataset.d)).size;
function show(wanted) {
  const index = Math.max(0, Math.min(count - 1, wanted));
  all('[data-d]').forEach(part => part.classList.toggle('on', part.dataset.d == index));
  if (slider) {
    slider.value = index;
    document.querySelector('.steer output').textContent = document.querySelector(`section[data-d="${index}"]`).dataset.when;
  }
  document.body.dataset.shown = index;
}
function fromAddress() {
  const found = /#dump=(\d+)/.exec(location.hash);
  show(found ? found[1] - 1 : count - 1);
}
all('[data-go]').forEach(strip => strip.addEventListener('click', () => show(+strip.dataset.go)));
if (slider) slider.addEventListener('input', () => show(+slider.value));
addEventListener('hashchange', fromAddress);
addEventListener('keydown', event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && event.target != slider) show(+document.body.dataset.shown + step);
});

// Pointing at a run or a cell says what it is.
const tip = document.querySelector('.tip');
addEventListener('mousemove', event => {
  const what = event.target.closest ? event.target.closest('[data-t]') : null;
  tip.style.display = what ? 'block' : 'none';
  if (!what) return;
  const [title, ...rest] = what.dataset.t.split('|');
  tip.replaceChildren(Object.assign(document.createElement('b'), { textContent: title }));
  rest.forEach(line => tip.append(Object.assign(document.createElement('div'), { textContent: line })));
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + 'px';
  tip.style.top = Math.min(event.clientY + 16, innerHeight - tip.offsetHeight - 8) + 'px';
});

// A click on a size leaves only that one in the map; a second click brings the others back.
all('.chip').forEach(chip => chip.addEventListener('click', () => {
  const card = chip.closest('.card'), on = !chip.classList.contains('on');
  card.querySelectorAll('.chip').forEach(other => other.classList.toggle('on', on && other == chip));
  card.classList.toggle('only', on);
  card.querySelectorAll('.r').forEach(run => run.classList.toggle('lit', run.classList.contains(chip.dataset.c)));
}));
fromAddress();
