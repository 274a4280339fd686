//! Powers of `x` modulo the polynomial of CRC-64/NVMe: what moves a sum over so many bits.

/// The polynomial, lowest bit highest.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// `x` to this power.
pub(super) const fn power(exponent: u32) -> u64 {
    let (mut value, mut at) = (1 << 63, 0);
    while at < exponent {
        value = if value & 1 == 1 { value >> 1 ^ POLYNOMIAL } else { value >> 1 };
        at += 1;
    }
    value
}
