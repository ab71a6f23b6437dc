// One DICOM series in, as a NIfTI case: dcm2niix, the converter of the field, reads it; which series counts is radiology/series_rules.toml's.

import { UserError, counted, short } from "./common.js";
import { readNifti } from "./nifti.js";

const OTHERWISE = "open one MR series by itself, or use the page with a server";
const FIELD_OF_VIEW = "The series is shown as it was scanned, and FLAIR stands in for the other channels. Where the head fills little of the " +
  "slices, or other series are there too, the page with a server prepares them as the model knows them.";

/** Whether a file's bytes are DICOM's. */
export const isDicom = ({ bytes }) => bytes.length > 132 && String.fromCharCode(...bytes.subarray(128, 132)) === "DICM";

/** The case of the one DICOM series among [{name, bytes}]. load: gives {createConverter, rules}: dcm2niix and the rules, as series_rules.toml
    has them. Throws UserError for several series, for what is not whole, and for what is no FLAIR by its own words. */
export async function readDicom(files, load) {
  const { createConverter, rules } = await load();
  const scans = files.filter(isDicom).filter(({ name }) => !/(^|\/)DICOMDIR$/i.test(name));
  if (!scans.length) throw new UserError(`the DICOM files hold no pictures (a DICOMDIR is only a list); ${OTHERWISE}`);
  const { scan, about } = await convert(scans, createConverter);
  if (about.Modality && about.Modality !== "MR") {
    throw new UserError(`the series is of modality ${short(about.Modality)}, and the network knows MR; ${OTHERWISE}`);
  }
  const doubt = notFlair(about, rules);
  const opened = readNifti([{ name: "DICOM series.nii", bytes: scan }]);
  if (doubt) opened.notes.push(doubt);
  const left = files.length - scans.length;
  if (left) opened.notes.push(`${counted(left, "file")} ignored: no DICOM picture.`);
  opened.notes.push(FIELD_OF_VIEW);
  return opened;
}

/** What dcm2niix makes of a series' files: {scan: a NIfTI file's bytes, about: what it says of the series}. */
async function convert(scans, createConverter) {
  const said = [], say = (line) => said.push(line);
  const { FS, callMain } = await createConverter({ noInitialRun: true, print: say, printErr: say });
  for (const folder of ["/in", "/out"]) FS.mkdir(folder);
  scans.forEach(({ bytes }, k) => FS.writeFile(`/in/${k}`, bytes)); // not by their names, which may be patients'
  const code = callMain(["-z", "n", "-b", "y", "-f", "scan", "-o", "/out", "/in"]);
  const made = FS.readdir("/out").filter((name) => name.endsWith(".nii"));
  if (!made.length) {
    throw new UserError(`${counted(scans.length, "DICOM file")} can't be read (damaged, compressed in an unknown way, or no pictures); ${OTHERWISE}`);
  }
  const found = said.map((line) => line.match(/^Convert (\d+) DICOM as .*\(\d+x\d+x\d+x(\d+)\)/)).find(Boolean);
  if (made.length > 1 || !found || Number(found[2]) !== 1) {
    throw new UserError(`the DICOM files are several series or volumes, but this page takes one; ${OTHERWISE}`);
  }
  if (code !== 0 || Number(found[1]) !== scans.length) {
    throw new UserError("the DICOM series is incomplete (slices are missing, occur twice, or are unevenly spaced); export it again");
  }
  return { scan: FS.readFile(`/out/${made[0]}`), about: JSON.parse(new TextDecoder().decode(FS.readFile("/out/scan.json"))) };
}

/** A note where a series does not say that it is FLAIR, or null. Throws UserError where it says that it is something else. */
function notFlair({ SeriesDescription = "", SequenceName = "", ProtocolName = "" }, rules) {
  const fits = (section, text) => {
    const has = (patterns = []) => patterns.some((pattern) => new RegExp(pattern, "i").test(text));
    return has(rules[section].any) && !has(rules[section].none);
  };
  for (const told of [`${SeriesDescription} ${SequenceName}`, ProtocolName]) {
    const text = told.replace(/[_\-./\\()[\]\s]+/g, " ").trim();
    const other = fits("leave_out", text) ? "one of those that are left out" : fits("t1", text) && !fits("flair", text) ? "a T1" : null;
    if (other) throw new UserError(`the series is ${other} by its header, but the network needs FLAIR; open the FLAIR series`);
    if (fits("flair", text)) return null;
  }
  return "The series does not say that it is FLAIR, and was taken as FLAIR because it is the only one.";
}
