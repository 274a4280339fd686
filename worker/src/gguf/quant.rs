//! Stored types of tensors and their decoding to f32.
//!
//! A quantised type stores groups of 32 or 256 values with shared scales; the
//! layouts are those of ggml.

use half::{bf16, f16};

/// How a tensor's values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "the names that everybody knows these types by")]
pub enum TensorType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// 32-bit floats without their low half.
    BF16,
    /// 32 values of 4 bits and a scale.
    Q4_0,
    /// 32 values of 4 bits, a scale and a minimum.
    Q4_1,
    /// 32 values of 5 bits and a scale.
    Q5_0,
    /// 32 values of 5 bits, a scale and a minimum.
    Q5_1,
    /// 32 values of 8 bits and a scale.
    Q8_0,
    /// 256 values of 4 bits with 8 scales and minima.
    Q4_K,
    /// 256 values of 6 bits with 16 scales.
    Q6_K,
}

impl TensorType {
    /// The type of a number in the file; else a word for the unknown one.
    pub(super) fn from_number(number: u32) -> Result<Self, String> {
        Ok(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            12 => Self::Q4_K,
            14 => Self::Q6_K,
            30 => Self::BF16,
            10 => return Err("Q2_K".to_owned()),
            11 => return Err("Q3_K".to_owned()),
            13 => return Err("Q5_K".to_owned()),
            other => return Err(format!("number {other}")),
        })
    }

    /// Values in a group.
    pub(super) fn group_values(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4_K | Self::Q6_K => 256,
        }
    }

    /// Stored bytes of a group.
    pub(super) fn group_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 2 + 16,
            Self::Q4_1 => 4 + 16,
            Self::Q5_0 => 2 + 4 + 16,
            Self::Q5_1 => 4 + 4 + 16,
            Self::Q8_0 => 2 + 32,
            Self::Q4_K => 4 + 12 + 128,
            Self::Q6_K => 128 + 64 + 16 + 2,
        }
    }

    /// Decodes whole groups.
    pub(super) fn decode(self, stored: &[u8], target: &mut [f32]) {
        let groups =
            stored.chunks_exact(self.group_bytes()).zip(target.chunks_exact_mut(self.group_values()));
        for (group, target) in groups {
            match self {
                Self::F32 => target[0] = f32::from_le_bytes([group[0], group[1], group[2], group[3]]),
                Self::F16 => target[0] = half_at(group, 0),
                Self::BF16 => target[0] = bf16::from_le_bytes([group[0], group[1]]).to_f32(),
                Self::Q4_0 => nibbles(half_at(group, 0), -8.0 * half_at(group, 0), &group[2..], target),
                Self::Q4_1 => nibbles(half_at(group, 0), half_at(group, 2), &group[4..], target),
                Self::Q5_0 => fives(half_at(group, 0), -16.0 * half_at(group, 0), &group[2..], target),
                Self::Q5_1 => fives(half_at(group, 0), half_at(group, 2), &group[4..], target),
                Self::Q8_0 => {
                    let scale = half_at(group, 0);
                    for (value, byte) in target.iter_mut().zip(&group[2..]) {
                        *value = scale * f32::from(byte.cast_signed());
                    }
                }
                Self::Q4_K => four_k(group, target),
                Self::Q6_K => six_k(group, target),
            }
        }
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// 32 values of 4 bits: low halves of the bytes first, then high halves.
fn nibbles(scale: f32, minimum: f32, bytes: &[u8], target: &mut [f32]) {
    for (at, byte) in bytes.iter().enumerate() {
        target[at] = scale * f32::from(byte & 15) + minimum;
        target[at + 16] = scale * f32::from(byte >> 4) + minimum;
    }
}

/// 32 values of 5 bits: four bytes of fifth bits, then as `nibbles`.
fn fives(scale: f32, minimum: f32, bytes: &[u8], target: &mut [f32]) {
    for (at, byte) in bytes[4..].iter().enumerate() {
        let high = |bit: usize| (bytes[bit / 8] >> (bit % 8) & 1) << 4;
        target[at] = scale * f32::from(byte & 15 | high(at)) + minimum;
        target[at + 16] = scale * f32::from(byte >> 4 | high(at + 16)) + minimum;
    }
}

/// 256 values of 4 bits in 8 runs of 32; each run has a 6-bit scale and minimum.
fn four_k(group: &[u8], target: &mut [f32]) {
    let (scale, minimum) = (half_at(group, 0), half_at(group, 2));
    let (packed, bytes) = group[4..].split_at(12);
    for (run, target) in target.chunks_exact_mut(32).enumerate() {
        let (run_scale, run_minimum) = if run < 4 {
            (packed[run] & 63, packed[run + 4] & 63)
        } else {
            (
                packed[run + 4] & 15 | (packed[run - 4] >> 6) << 4,
                packed[run + 4] >> 4 | (packed[run] >> 6) << 4,
            )
        };
        let (factor, offset) = (scale * f32::from(run_scale), minimum * f32::from(run_minimum));
        for (value, byte) in target.iter_mut().zip(&bytes[run / 2 * 32..]) {
            let bits = if run % 2 == 0 { byte & 15 } else { byte >> 4 };
            *value = factor * f32::from(bits) - offset;
        }
    }
}

/// 256 values of 6 bits: 128 bytes of low bits, 64 of high bits, 16 scales.
fn six_k(group: &[u8], target: &mut [f32]) {
    let (low, rest) = group.split_at(128);
    let (high, rest) = rest.split_at(64);
    let scale = half_at(rest, 16);
    for (at, value) in target.iter_mut().enumerate() {
        // Each half of 128 values is four runs of 32 that share bytes.
        let (half, within) = (at / 128, at % 128);
        let (run, lane) = (within / 32, within % 32);
        let byte = low[half * 64 + run % 2 * 32 + lane];
        let four = if run < 2 { byte & 15 } else { byte >> 4 };
        let two = high[half * 32 + lane] >> (run * 2) & 3;
        let bits = f32::from((four | two << 4).cast_signed()) - 32.0;
        *value = scale * f32::from(rest[at / 16].cast_signed()) * bits;
    }
}
