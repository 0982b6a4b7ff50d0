// Connected regions of a label map: where a name fits, and which outlines would only be clutter. As the package's
// `outputs/regions.py` does it.

const GRID = 256; // names are placed on a map reduced to at most so many pixels a side
const DIAGONAL = Math.SQRT2;
const LEAST_NAMED = 0.006; // share of the pixels below which a region gets no name
const REACH = 7; // pixels in each direction among which outlines are counted
const MOST_OUTLINE = 0.3; // share of outlines among these, above which none is drawn: an unsure model gives specks

/**
 * Where names fit: [{label, x, y, radius}] in pixels of the map, largest region first. `named(label)` says which count,
 * and `from` and `to` between which columns.
 */
export function namePlaces(labels, width, height, named, from = 0, to = width) {
  const step = Math.max(1, Math.ceil(Math.max(width, height) / GRID));
  const half = step >> 1;
  const [columns, rows] = [Math.ceil((width - half) / step), Math.ceil((height - half) / step)];
  // With an edge of one pixel around it that has no name, so that every pixel has neighbours.
  const stride = columns + 2;
  const small = new Int32Array(stride * (rows + 2)).fill(-1);
  const counts = new Map(); // whether a label has a name
  for (let row = 0; row < rows; row++) {
    const start = (row * step + half) * width + half;
    for (let column = 0, at = (row + 1) * stride + 1; column < columns; column++, at++) {
      const x = column * step + half;
      if (x < from || x >= to) continue;
      const label = labels[start + column * step];
      let counted = counts.get(label);
      if (counted === undefined) counts.set(label, (counted = named(label)));
      if (counted) small[at] = label;
    }
  }
  const distance = edgeDistances(small, stride);
  const large = regions(small, distance, stride).filter(({ size }) => size >= LEAST_NAMED * columns * rows);
  return large.sort((a, b) => b.size - a.size).map(({ at }) => ({
    label: small[at],
    x: Math.min(width - 1, ((at % stride) - 0.5) * step),
    y: Math.min(height - 1, (Math.floor(at / stride) - 0.5) * step),
    radius: (distance[at] + 0.5) * step,
  }));
}

/** How far each pixel is from one of another label (0 where there is no name), about as the crow flies. */
function edgeDistances(small, stride) {
  const distance = new Float32Array(small.length);
  for (let at = stride + 1; at < small.length - stride - 1; at++) {
    const label = small[at];
    if (label >= 0) {
      const left = small[at - 1] === label ? distance[at - 1] + 1 : 0;
      const above = small[at - stride] === label ? distance[at - stride] + 1 : 0;
      const before = small[at - stride - 1] === label ? distance[at - stride - 1] + DIAGONAL : 0;
      const after = small[at - stride + 1] === label ? distance[at - stride + 1] + DIAGONAL : 0;
      distance[at] = Math.min(left, above, before, after);
    }
  }
  for (let at = small.length - stride - 2; at > stride; at--) {
    const label = small[at];
    if (label >= 0) {
      const right = small[at + 1] === label ? distance[at + 1] + 1 : 0;
      const below = small[at + stride] === label ? distance[at + stride] + 1 : 0;
      const before = small[at + stride - 1] === label ? distance[at + stride - 1] + DIAGONAL : 0;
      const after = small[at + stride + 1] === label ? distance[at + stride + 1] + DIAGONAL : 0;
      distance[at] = Math.min(distance[at], right, below, before, after);
    }
  }
  return distance;
}

/** Connected pixels of one label, edges left out: [{size, at}], `at` the pixel farthest from the edge. */
function regions(small, distance, stride) {
  const seen = new Uint8Array(small.length);
  const stack = new Int32Array(small.length);
  const found = [];
  for (let start = 0; start < small.length; start++) {
    if (seen[start] || !distance[start]) continue;
    const region = { size: 0, at: start };
    let waiting = 0;
    seen[start] = 1;
    stack[waiting++] = start;
    while (waiting) {
      const at = stack[--waiting];
      region.size++;
      if (distance[at] > distance[region.at]) region.at = at;
      for (let side = 0; side < 4; side++) {
        const next = side === 0 ? at - 1 : side === 1 ? at + 1 : side === 2 ? at - stride : at + stride;
        if (seen[next] || !distance[next]) continue;
        seen[next] = 1;
        stack[waiting++] = next;
      }
    }
    found.push(region);
  }
  return found;
}

/**
 * The connected part, also across corners, of one label that {x, y} is in, on a map reduced to at most GRID pixels a
 * side: {label, step, columns, rows, inside} with 1 in `inside` [rows * columns] where it is. null where {x, y} lies on
 * something too thin for that.
 */
export function partAt(labels, width, height, { x, y }) {
  const step = Math.max(1, Math.ceil(Math.max(width, height) / GRID));
  const [columns, rows] = [Math.ceil(width / step), Math.ceil(height / step)];
  const middle = (cell, size) => Math.min(size - 1, cell * step + (step >> 1));
  const labelOf = (column, row) => labels[middle(row, height) * width + middle(column, width)];
  const label = labels[y * width + x];
  const [first, top] = [Math.floor(x / step), Math.floor(y / step)];
  if (labelOf(first, top) !== label) return null;
  const inside = new Uint8Array(columns * rows);
  const waiting = [top * columns + first];
  inside[waiting[0]] = 1;
  while (waiting.length) {
    const at = waiting.pop();
    const [column, row] = [at % columns, Math.floor(at / columns)];
    for (let down = Math.max(0, row - 1); down <= Math.min(rows - 1, row + 1); down++) {
      for (let across = Math.max(0, column - 1); across <= Math.min(columns - 1, column + 1); across++) {
        const next = down * columns + across;
        if (inside[next] || labelOf(across, down) !== label) continue;
        inside[next] = 1;
        waiting.push(next);
      }
    }
  }
  return { label, step, columns, rows, inside };
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
