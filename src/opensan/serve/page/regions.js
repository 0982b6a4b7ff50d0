// Connected regions of a label map: where a name fits, and which outlines would only be clutter. As the package's
// `outputs/regions.py` does it.

const GRID = 256; // names are placed on a map reduced to at most so many pixels a side
const LEAST_NAMED = 0.006; // share of the pixels below which a region gets no name
const REACH = 7; // pixels in each direction among which outlines are counted
const MOST_OUTLINE = 0.3; // share of outlines among these, above which none is drawn: an unsure model gives specks

/** Where names fit: [{label, x, y, radius}] in pixels of the map, largest region first. `named(label)` says which count. */
export function namePlaces(labels, width, height, named) {
  const step = Math.max(1, Math.ceil(Math.max(width, height) / GRID));
  const [columns, rows] = [Math.ceil((width - (step >> 1)) / step), Math.ceil((height - (step >> 1)) / step)];
  const small = new Int32Array(columns * rows);
  for (let row = 0, at = 0; row < rows; row++) {
    const start = (row * step + (step >> 1)) * width + (step >> 1);
    for (let column = 0; column < columns; column++, at++) {
      const label = labels[start + column * step];
      small[at] = named(label) ? label : -1;
    }
  }
  const distance = edgeDistances(small, columns, rows);
  const places = regions(small, distance, columns, rows).filter(({ size }) => size >= LEAST_NAMED * small.length);
  places.sort((a, b) => b.size - a.size);
  return places.map(({ at }) => ({
    label: small[at],
    x: Math.min(width - 1, ((at % columns) + 0.5) * step),
    y: Math.min(height - 1, (Math.floor(at / columns) + 0.5) * step),
    radius: (distance[at] + 0.5) * step,
  }));
}

/** How far each pixel is from one of another label (0 there, and where there is no name), about as the crow flies. */
function edgeDistances(small, columns, rows) {
  const distance = new Float32Array(small.length);
  const nearest = (at, before, row, column) => {
    let least = Infinity;
    for (const [down, right, far] of before) {
      const [r, c] = [row + down, column + right];
      const outside = r < 0 || c < 0 || r >= rows || c >= columns;
      const there = at + down * columns + right;
      const reach = outside || small[there] !== small[at] ? 0 : distance[there] + far;
      if (reach < least) least = reach;
    }
    return least;
  };
  const before = [[-1, -1, 1.414], [-1, 0, 1], [-1, 1, 1.414], [0, -1, 1]];
  const after = before.map(([down, right, far]) => [-down, -right, far]);
  for (let at = 0; at < small.length; at++) {
    distance[at] = small[at] < 0 ? 0 : nearest(at, before, Math.floor(at / columns), at % columns);
  }
  for (let at = small.length - 1; at >= 0; at--) {
    if (distance[at]) distance[at] = Math.min(distance[at], nearest(at, after, Math.floor(at / columns), at % columns));
  }
  return distance;
}

/** Connected pixels of one label, edges left out: [{size, at}], `at` the pixel farthest from the edge. */
function regions(small, distance, columns, rows) {
  const seen = new Uint8Array(small.length);
  const stack = [];
  const found = [];
  const visit = (at) => {
    if (seen[at] || !distance[at]) return;
    seen[at] = 1;
    stack.push(at);
  };
  for (let start = 0; start < small.length; start++) {
    visit(start);
    if (!stack.length) continue;
    const region = { size: 0, at: start };
    while (stack.length) {
      const at = stack.pop();
      region.size++;
      if (distance[at] > distance[region.at]) region.at = at;
      const column = at % columns;
      if (column) visit(at - 1);
      if (column + 1 < columns) visit(at + 1);
      if (at >= columns) visit(at - columns);
      if (at + columns < small.length) visit(at + columns);
    }
    found.push(region);
  }
  return found;
}

/** Clears outlines (1 in `outlines`, [height * width]) that are many in a small area. */
export function withoutCrowds(outlines, width, height) {
  const most = MOST_OUTLINE * (2 * REACH + 1) ** 2;
  const sums = new Uint16Array(width); // of the rows around this one, in each column
  const kept = new Uint8Array(outlines.length);
  for (let row = -REACH; row < height; row++) {
    const [enter, leave] = [(row + REACH) * width, (row - REACH - 1) * width];
    if (row + REACH < height) for (let column = 0; column < width; column++) sums[column] += outlines[enter + column];
    if (row > REACH) for (let column = 0; column < width; column++) sums[column] -= outlines[leave + column];
    if (row < 0) continue;
    let around = 0;
    for (let column = 0; column < Math.min(REACH, width); column++) around += sums[column];
    for (let column = 0, at = row * width; column < width; column++, at++) {
      if (column + REACH < width) around += sums[column + REACH];
      if (column > REACH) around -= sums[column - REACH - 1];
      kept[at] = outlines[at] & (around <= most);
    }
  }
  return kept;
}
