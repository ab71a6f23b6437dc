// The reader's choices.

import { SLICE_TYPE } from "@niivue/niivue";

export const CHANNELS = { pre: 0, FLAIR: 1, post: 2, composite: null };
export const PLANES = { axial: SLICE_TYPE.AXIAL, planes: SLICE_TYPE.MULTIPLANAR, "3-D": SLICE_TYPE.RENDER };
export const WINDOWS = { "full range": [0, 255], soft: [20, 200], bright: [0, 160], hard: [60, 180] }; // darkest and brightest value shown
