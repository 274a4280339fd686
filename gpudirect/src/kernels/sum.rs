//! Checksums of blocks where they lie, equal to those of the host.

use std::sync::Arc;

use terrace_core::{BlockId, ByteCount, Checksum, Checksummer};

use super::queue::{KernelBytes, KernelQueue, Launch, Parameters, bytes_of};
use super::{Kernel, KernelError};

/// Threads of a group; the kernel's own constant.
const THREADS: u32 = 256;
const WORD_BYTES: usize = 8;
/// Rows that a group adds up: 64 KiB, so that the tables are read for much more than their own size, and a
/// block of 2 MiB keeps 32 groups busy.
const ROWS_A_GROUP: u32 = 32;
/// CRC-64/NVMe, bit 63 standing for x^0.
const POLYNOMIAL: u64 = 0x9A6C_9329_AC4B_C9B5;
const ONE: u64 = 1 << 63;

#[derive(Clone, Copy)]
#[repr(C)]
struct Sum {
    blocks: u64,
    states: u64,
    sums: u64,
    advance: u64,
    columns: u64,
    powers: u64,
    words: u32,
    rows: u32,
    rows_a_group: u32,
}

// SAFETY: the fields of `Sum` in checksum.cu.
unsafe impl Parameters for Sum {}

/// Sums blocks on one queue.
#[derive(Debug)]
pub struct Summer {
    queue: Arc<dyn KernelQueue>,
    advance: KernelBytes,
    columns: KernelBytes,
    powers: KernelBytes,
}

impl Summer {
    /// Puts the tables onto the device.
    ///
    /// # Errors
    /// What the queue says.
    pub fn new(queue: Arc<dyn KernelQueue>) -> Result<Self, KernelError> {
        let powers = powers();
        let row = power(&powers, 64 * u64::from(THREADS));
        let mut advance = Vec::with_capacity(8 * 256);
        for place in 0..8 {
            advance.extend((0u64..256).map(|byte| multiply(byte << (8 * place), row)));
        }
        let columns: Vec<u64> =
            (0..THREADS).map(|thread| power(&powers, 64 * u64::from(THREADS - 1 - thread))).collect();
        let put = |values: &[u64]| {
            let bytes = queue.allocate(size_of_val(values))?;
            queue.write(&bytes, &bytes_of(values))?;
            Ok::<_, KernelError>(bytes)
        };
        let (advance, columns, powers) = (put(&advance)?, put(&columns)?, put(&powers)?);
        Ok(Self { queue, advance, columns, powers })
    }

    /// The checksums of whole payloads of one space, and waits for them.
    ///
    /// # Errors
    /// [`KernelError::BadJob`] if payloads differ in length, are no multiple of 8 bytes, or do not begin at
    /// one; else what the queue says.
    pub fn checksums(
        &self,
        blocks: &[(BlockId, KernelBytes)],
        generation: u64,
    ) -> Result<Vec<Checksum>, KernelError> {
        let Some((_, first)) = blocks.first() else { return Ok(Vec::new()) };
        let length = first.len();
        if length == 0 || !length.is_multiple_of(WORD_BYTES) {
            return Err(KernelError::bad(format!("payloads of {length} bytes are no whole words")));
        }
        let words = u32::try_from(length / WORD_BYTES)
            .ok()
            .filter(|words| *words <= u32::MAX - THREADS)
            .ok_or_else(|| KernelError::bad(format!("payloads of {length} bytes")))?;
        for (_, bytes) in blocks {
            bytes.fits(length)?;
            if !bytes.address().is_multiple_of(WORD_BYTES as u64) {
                return Err(KernelError::bad(format!("a payload at {:#x}", bytes.address())));
            }
        }
        let mut sums = Vec::with_capacity(blocks.len());
        // The second direction of a grid ends at 65,535.
        for part in blocks.chunks(usize::from(u16::MAX)) {
            sums.extend(self.launch(part, generation, words)?);
        }
        Ok(sums)
    }

    fn launch(
        &self,
        blocks: &[(BlockId, KernelBytes)],
        generation: u64,
        words: u32,
    ) -> Result<Vec<Checksum>, KernelError> {
        let count = blocks.len();
        let length = ByteCount::new(u64::from(words) * WORD_BYTES as u64);
        let mut table: Vec<u64> = blocks.iter().map(|(_, bytes)| bytes.address()).collect();
        table.extend(blocks.iter().map(|(id, _)| Checksummer::new(*id, length, generation).state()));
        // Zeros for the sums.
        table.resize(3 * count, 0);
        let memory = self.queue.allocate(3 * count * WORD_BYTES)?;
        self.queue.write(&memory, &bytes_of(&table))?;
        let at = |part: usize| memory.address() + (part * count * WORD_BYTES) as u64;
        let rows = words.div_ceil(THREADS);
        let sum = Sum {
            blocks: at(0),
            states: at(1),
            sums: at(2),
            advance: self.advance.address(),
            columns: self.columns.address(),
            powers: self.powers.address(),
            words,
            rows,
            rows_a_group: ROWS_A_GROUP,
        };
        let blocks = u32::try_from(count).map_err(|_| KernelError::bad("too many blocks"))?;
        let grid = [rows.div_ceil(ROWS_A_GROUP), blocks, 1];
        // SAFETY: the tables have the kernel's sizes; every payload has `words` words at an aligned address
        // and is kept by the caller until the sums are read below.
        unsafe { self.queue.launch(Launch::new(Kernel::Checksum, grid, THREADS, &sum)) }?;
        let mut found = vec![0; count * WORD_BYTES];
        self.queue.read(&memory.part(2 * count * WORD_BYTES, count * WORD_BYTES)?, &mut found)?;
        let words = found.as_chunks::<WORD_BYTES>().0;
        Ok(words.iter().map(|word| Checksum::new(!u64::from_le_bytes(*word))).collect())
    }
}

/// The product of two polynomials, modulo that of the sum.
fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    for bit in (0..64).rev() {
        if a >> bit & 1 == 1 {
            product ^= b;
        }
        b = (b >> 1) ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
    }
    product
}

/// x^(2^k), for every bit of an exponent.
fn powers() -> Vec<u64> {
    let mut power = ONE >> 1;
    (0..64)
        .map(|_| {
            let now = power;
            power = multiply(power, power);
            now
        })
        .collect()
}

fn power(powers: &[u64], exponent: u64) -> u64 {
    let bits = powers.iter().enumerate().filter(|(bit, _)| exponent >> bit & 1 == 1);
    bits.fold(ONE, |product, (_, power)| multiply(product, *power))
}
