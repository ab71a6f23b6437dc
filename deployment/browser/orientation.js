// Where the patient's left is in a NIfTI file, by the rules of scans/orientation.py and scans/nifti_file.py.

import { Utils } from "nifti-reader-js";

const SHEARED = 0.005; // cosine of the angle between two stored axes
const APART = 1, OFF_GRID = 0.1; // mm between qform and sform; voxels by which a mask may lie beside its scan
const SROW = 280; // where the header's affine begins, 3 × 4 float32

const sform = (header, data) => [0, 1, 2].map((row) =>
  [0, 1, 2, 3].map((column) => Utils.getFloatAt(new DataView(data), SROW + 16 * row + 4 * column, header.littleEndian)));
const qform = (header) => header.getQformMat().slice(0, 3);

/** The matrix from voxels to mm, 3 × 4: the header's sform if it has one, else its qform, else the pixel size with x turned and
    the middle at 0, as nibabel does it. */
export function affine(header, data) {
  if (header.sform_code > 0) return sform(header, data);
  if (header.qform_code > 0) return qform(header);
  const sizes = [-header.pixDims[1], header.pixDims[2], header.pixDims[3]];
  return sizes.map((size, row) => [0, 1, 2, 3].map((column) =>
    (column === row ? size : column === 3 ? (-size * (header.dims[row + 1] - 1)) / 2 : 0)));
}

/** Why a header's orientation can't be relied on, in words that follow the file's name, or null where it can. */
export function doubt(header, data, shape) {
  const records = [];
  if (header.qform_code > 0) records.push(["qform", qform(header)]);
  if (header.sform_code > 0) records.push(["sform", sform(header, data)]);
  if (!records.length) return "does not give the patient's orientation (qform and sform code are 0)";
  for (const [name, matrix] of records) {
    const columns = [0, 1, 2].map((column) => matrix.map((row) => row[column]));
    const [a, b, c] = columns, dot = (u, v) => u[0] * v[0] + u[1] * v[1] + u[2] * v[2];
    const volume = dot(a, [b[1] * c[2] - b[2] * c[1], b[2] * c[0] - b[0] * c[2], b[0] * c[1] - b[1] * c[0]]);
    if (!matrix.flat().every(Number.isFinite) || Math.abs(volume) < 1e-6) return `places all voxels in one plane, or gives no valid place (its ${name})`;
    const cosine = (u, v) => Math.abs(dot(u, v)) / Math.sqrt(dot(u, u) * dot(v, v));
    if (Math.max(cosine(a, b), cosine(a, c), cosine(b, c)) > SHEARED) return `has axes that are not at right angles (its ${name} is sheared)`;
  }
  if (records.length === 2) {
    const apart = distanceApart(records[0][1], records[1][1], shape);
    if (apart > APART) return `contradicts itself: its qform and sform place a voxel ${Math.round(apart)} mm apart`;
  }
  return null;
}

/** How far two matrices, 3 × 4, place a voxel of a volume apart, at most, in mm. */
function distanceApart(one, other, shape) {
  let most = 0;
  for (let corner = 0; corner < 8; corner++) {
    const index = [...shape.map((size, axis) => ((corner >> axis) & 1) * (size - 1)), 1];
    most = Math.max(most, Math.hypot(...one.map((row, k) => row.reduce((sum, value, column) => sum + (value - other[k][column]) * index[column], 0))));
  }
  return most;
}

/** Whether two volumes that are turned alike lie on one grid. */
export function samePlace(one, other) {
  const size = [one.width, one.height, one.count];
  const finest = Math.min(...[0, 1, 2].map((axis) => Math.hypot(...one.shown.map((row) => row[axis]))));
  return distanceApart(one.shown, other.shown, size) <= OFF_GRID * finest;
}

/** How voxels of this shape become slices from feet to head with the front at the top and the patient's left at the right:
    count, height, width, the stored axis of columns, rows and slices, `place`, from a slice pixel's index to the voxel's, and
    `shown`, the matrix from (column, row, slice) to mm. matrix: 3 × 4, from voxels to mm to the right, front and top.
    The stored axis that is nearest to each of the body's is taken, the best fitting first (as nibabel does it). */
export function turn(shape, matrix) {
  const lengths = [0, 1, 2].map((axis) => Math.hypot(...matrix.map((row) => row[axis])) || 1);
  const cosine = (body, axis) => matrix[body][axis] / lengths[axis];
  const best = (axis) => Math.max(...[0, 1, 2].map((body) => Math.abs(cosine(body, axis))));
  const axes = [], signs = [];
  for (const axis of [0, 1, 2].sort((a, b) => best(b) - best(a))) {
    const free = [0, 1, 2].filter((body) => axes[body] === undefined);
    const body = free.reduce((a, b) => (Math.abs(cosine(b, axis)) > Math.abs(cosine(a, axis)) ? b : a));
    axes[body] = axis;
    signs[body] = cosine(body, axis) < 0 ? -1 : 1;
  }
  const strides = [1, shape[0], shape[0] * shape[1]];
  const [width, height, count] = axes.map((axis) => shape[axis]);
  const step = axes.map((axis, body) => signs[body] * strides[axis]);
  const start = axes.reduce((sum, axis, body) => sum + (signs[body] < 0 ? (shape[axis] - 1) * strides[axis] : 0), 0);
  const place = (k) => {
    const x = width - 1 - (k % width), y = height - 1 - (Math.floor(k / width) % height), z = Math.floor(k / (width * height));
    return start + x * step[0] + y * step[1] + z * step[2];
  };
  const leads = [-1, -1, 1].map((way, body) => way * signs[body]); // columns to the left, rows to the back, slices to the head
  const shown = matrix.map((row) => [...axes.map((axis, body) => leads[body] * row[axis]),
    axes.reduce((sum, axis, body) => sum + (leads[body] < 0 ? row[axis] * (shape[axis] - 1) : 0), row[3] ?? 0)]);
  return { count, height, width, axes, place, shown };
}
