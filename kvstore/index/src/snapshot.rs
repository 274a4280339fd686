//! An index as bytes, and back. Little-endian words of eight bytes:
//!
//! magic; bytes in all; operations so far; runs; then for each run its number, the number of the run it
//! goes on from (0 if none), the live blocks as bits, their keys (two words each), the number of records,
//! and the records (four words each); at the end a checksum of all before it.
//!
//! What is cut off, changed or invented is refused before it is used. Runs come in the order of their
//! numbers, so one state has one snapshot.

use std::sync::atomic::Ordering;

use crate::ids::{HolderId, Key, Limits};
use crate::index::Index;
use crate::run::{EXTENT_RECORDS, Next, Place, RECORD_WORDS, Tables, holder_of};
use crate::write::{EXTENTS_READY, RUNS_READY, Writer, all_of};

const MAGIC: u64 = u64::from_le_bytes(*b"TRCIDX01");
const WORD_BYTES: usize = 8;
/// Words before the first run.
const HEAD_WORDS: usize = 4;

/// Why a snapshot was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSnapshot {
    /// Not a snapshot, or of another format.
    #[error("no snapshot of this format")]
    Magic,
    /// Cut off, or followed by something.
    #[error("a snapshot of {expected} bytes has {found}")]
    Length {
        /// What it says of itself.
        expected: u64,
        /// Its length.
        found: u64,
    },
    /// Changed on its way.
    #[error("the snapshot's checksum is wrong")]
    Checksum,
    /// A run contradicts itself or another.
    #[error("run {run} of the snapshot contradicts itself")]
    Run {
        /// Its place in the snapshot, from 0.
        run: u64,
    },
    /// A holder's number is not below the limit.
    #[error("holder {holder} of the snapshot is out of range; holders are numbered below {limit}")]
    Holder {
        /// The number.
        holder: u32,
        /// The limit.
        limit: u32,
    },
}

/// A run as a snapshot has it.
#[derive(Debug, Default)]
pub(crate) struct Image {
    pub(crate) live: u64,
    pub(crate) keys: Vec<Key>,
    pub(crate) records: Vec<[u64; RECORD_WORDS]>,
}

impl Index {
    /// All of it as bytes. Writers wait meanwhile, readers do not.
    ///
    /// # Panics
    /// If a writer panicked before.
    pub fn snapshot(&self) -> Vec<u8> {
        let writer = self.guard();
        let mut words = vec![MAGIC, 0, u64::from(writer.clock), 0];
        for number in 1..self.tables.runs.items() {
            if self.tables.runs.at(number).live.load(Ordering::Relaxed) != 0 {
                words[3] += 1;
                words.extend([
                    u64::from(number),
                    u64::from(writer.parent(number).map_or(0, |place| place.run)),
                ]);
                put_run(&self.tables, number, &mut words);
            }
        }
        words[1] = ((words.len() + 1) * WORD_BYTES) as u64;
        let sum = checksum(&words);
        words.push(sum);
        words.into_iter().flat_map(u64::to_le_bytes).collect()
    }

    /// An index from a snapshot. Under smaller limits the coldest is left out.
    ///
    /// # Errors
    /// [`BadSnapshot`] if anything is wrong with it.
    pub fn restore(limits: Limits, bytes: &[u8]) -> Result<Self, BadSnapshot> {
        let words = checked(bytes)?;
        let index = Self::new(limits);
        let mut reader = Reader { words: &words[HEAD_WORDS..words.len() - 1], at: 0 };
        {
            let mut writer = index.guard();
            // The low half: operations wrap at 32 bits.
            writer.clock = u32::try_from(words[2] & u64::from(u32::MAX)).unwrap_or(0);
            let mut numbers = Vec::new();
            for run in 0..words[3] {
                let bad = BadSnapshot::Run { run };
                let (old, parent) = reader.next().zip(reader.next()).ok_or(bad)?;
                let image = reader.image(index.limits().holders, bad)?;
                let new = writer.restore(&index.tables, &image).ok_or(bad)?;
                numbers.push((old, parent, new));
            }
            let sorted = numbers.is_sorted_by(|a, b| a.0 < b.0);
            if !sorted || reader.at != reader.words.len() {
                return Err(BadSnapshot::Run { run: words[3] });
            }
            for (_, parent, new) in &numbers {
                if let Ok(at) = numbers.binary_search_by_key(parent, |(old, ..)| *old) {
                    writer.adopt(&index.tables, numbers[at].2, *new);
                }
            }
        }
        Ok(index)
    }
}

fn put_run(tables: &Tables, number: u32, words: &mut Vec<u64>) {
    let run = tables.runs.at(number);
    let live = run.live.load(Ordering::Relaxed);
    words.push(live);
    let mut left = live;
    while left != 0 {
        let key = tables.key(run, left.trailing_zeros()).expect("a live block has a key");
        words.extend([key.low, key.high]);
        left &= left - 1;
    }
    let count_at = words.len();
    words.push(0);
    tables.each_record(run, |record| {
        if all_of(record) != 0 {
            words[count_at] += 1;
            words.extend(record.iter().map(|word| word.load(Ordering::Relaxed)));
        }
        Next::Go
    });
}

/// The words of a snapshot whose length and checksum are right.
fn checked(bytes: &[u8]) -> Result<Vec<u64>, BadSnapshot> {
    let (chunks, rest) = bytes.as_chunks::<WORD_BYTES>();
    if chunks.first().map(|word| u64::from_le_bytes(*word)) != Some(MAGIC) {
        return Err(BadSnapshot::Magic);
    }
    let found = bytes.len() as u64;
    let expected = chunks.get(1).map_or(0, |word| u64::from_le_bytes(*word));
    if expected != found || !rest.is_empty() || chunks.len() <= HEAD_WORDS {
        return Err(BadSnapshot::Length { expected, found });
    }
    let words: Vec<u64> = chunks.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let (sum, summed) = words.split_last().expect("a snapshot has a head");
    if checksum(summed) == *sum { Ok(words) } else { Err(BadSnapshot::Checksum) }
}

/// Finds what was cut or flipped; no guard against forgery.
fn checksum(words: &[u64]) -> u64 {
    words.iter().fold(0x243f_6a88_85a3_08d3, |sum: u64, word| {
        let mixed = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93).rotate_left(17)
    })
}

struct Reader<'a> {
    words: &'a [u64],
    at: usize,
}

impl Reader<'_> {
    fn next(&mut self) -> Option<u64> {
        let word = self.words.get(self.at).copied();
        self.at += 1;
        word
    }

    /// A run whose blocks are all held, by holders in range, each once.
    fn image(&mut self, holders: u32, bad: BadSnapshot) -> Result<Image, BadSnapshot> {
        let mut image = Image { live: self.next().ok_or(bad)?, ..Image::default() };
        for _ in 0..image.live.count_ones() {
            let (low, high) = self.next().zip(self.next()).ok_or(bad)?;
            image.keys.push(Key { low, high });
        }
        let (mut held, mut last) = (0, Vec::new());
        for _ in 0..self.next().ok_or(bad)? {
            let mut record = [0; RECORD_WORDS];
            for word in &mut record {
                *word = self.next().ok_or(bad)?;
            }
            let HolderId(holder) = holder_of(record[0]).ok_or(bad)?;
            if holder >= holders {
                return Err(BadSnapshot::Holder { holder, limit: holders });
            }
            let bits = record[1] | record[2] | record[3];
            if bits == 0 || bits & !image.live != 0 {
                return Err(bad);
            }
            held |= bits;
            last.push(holder);
            image.records.push(record);
        }
        last.sort_unstable();
        let twice = last.windows(2).any(|pair| pair[0] == pair[1]);
        if held != image.live || image.live == 0 || twice { Err(bad) } else { Ok(image) }
    }
}

impl Writer {
    /// Makes a run of a snapshot. None if a block of it is in the index already. Number and life of the run.
    fn restore(&mut self, tables: &Tables, image: &Image) -> Option<(u32, u32)> {
        let records = image.records.len().div_ceil(EXTENT_RECORDS as usize);
        self.reserve(tables, RUNS_READY, EXTENTS_READY + records);
        let number = self.open(tables, None).run;
        let mut left = image.live;
        for key in &image.keys {
            if tables.locate(*key).is_some() {
                return None;
            }
            // All of them are listed, so that a block that comes twice is seen.
            self.put_listed(tables, Place { run: number, position: left.trailing_zeros() }, *key);
            left &= left - 1;
        }
        for words in &image.records {
            let record = self.admit(tables, number, words[0]);
            for (word, bits) in record[1..].iter().zip(&words[1..]) {
                word.store(*bits, Ordering::Release);
            }
            self.entries += u64::from(all_of(record).count_ones());
        }
        Some((number, self.notes[number as usize].birth))
    }

    /// Notes that `child` goes on from `parent`, if neither is gone.
    fn adopt(&mut self, tables: &Tables, parent: (u32, u32), child: (u32, u32)) {
        let is_here = |(number, birth): (u32, u32)| self.notes[number as usize].birth == birth;
        if is_here(parent) && is_here(child) && parent.0 != child.0 {
            self.notes[0].children -= 1;
            self.notes[parent.0 as usize].children += 1;
            let note = &mut self.notes[child.0 as usize];
            // The block is not in a snapshot: probably the last.
            let place = Place { run: parent.0, position: tables.runs.at(parent.0).end().max(1) - 1 };
            (note.parent, note.parent_birth) = (place.bits(), parent.1);
            tables.runs.at(parent.0).set_next(child.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Found, TierSet};

    const LIMITS: Limits = Limits { holders: 200, bytes: 16 << 20 };

    fn chain(number: u64, blocks: u64) -> Vec<Key> {
        (0..blocks).map(|at| Key::from_alias(number << 20 | at)).collect()
    }

    /// 100 holders of a common beginning, branches, holes, and all tiers.
    fn sample() -> Index {
        let index = Index::new(LIMITS);
        for holder in 0..100 {
            let mut blocks = chain(0, 32);
            blocks.extend(chain(u64::from(holder) + 1, 100));
            let tiers = TierSet::from_bits(u8::try_from(holder % 7).unwrap() + 1).unwrap();
            index.store(HolderId(holder), tiers, None, &blocks).unwrap();
            index.remove(HolderId(holder), TierSet::HBM, &blocks[40..45]).unwrap();
        }
        index
    }

    fn answers(index: &Index) -> String {
        let mut found = Found::new();
        let mut text = format!("{:?}", index.counts().entries);
        for holder in 0..100 {
            let mut prompt = chain(0, 32);
            prompt.extend(chain(holder + 1, 100));
            index.find(&prompt, &mut found);
            text += &format!("{} {:?} {:?}", found.blocks(), found.holders(), found.spans());
        }
        text
    }

    /// A restart could lose holes, tiers, heat or the order of eviction: the restored index gives the same
    /// answers and the same snapshot.
    #[test]
    fn a_restored_index_answers_alike() {
        let index = sample();
        let bytes = index.snapshot();
        let restored = Index::restore(LIMITS, &bytes).unwrap();
        assert_eq!(answers(&restored), answers(&index));
        assert_eq!(restored.snapshot().len(), bytes.len());
        let third = Index::restore(LIMITS, &restored.snapshot()).unwrap();
        assert_eq!(third.snapshot(), restored.snapshot());
        (0..100).for_each(|holder| assert!(restored.clear(HolderId(holder)).is_ok()));
        assert_eq!((restored.counts().blocks, restored.counts().records), (0, 0));
    }

    /// A snapshot that was cut in the middle, or has a bit flipped, must not become an index.
    #[test]
    fn a_cut_or_changed_snapshot_is_refused() {
        let index = Index::new(LIMITS);
        index.store(HolderId(3), TierSet::NVME, None, &chain(1, 70)).unwrap();
        let bytes = index.snapshot();
        for length in 0..bytes.len() {
            assert!(Index::restore(LIMITS, &bytes[..length]).is_err(), "cut at {length}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            assert!(Index::restore(LIMITS, &changed).is_err(), "changed at {at}");
        }
        let few = Limits { holders: 3, ..LIMITS };
        assert_eq!(Index::restore(few, &bytes).err(), Some(BadSnapshot::Holder { holder: 3, limit: 3 }));
    }

    /// A right checksum over wrong words: every word of a snapshot is replaced, and nothing panics.
    #[test]
    fn invented_words_never_panic() {
        let index = Index::new(LIMITS);
        index.store(HolderId(3), TierSet::NVME, None, &chain(1, 70)).unwrap();
        index.store(HolderId(4), TierSet::HBM, None, &chain(1, 20)).unwrap();
        let bytes = index.snapshot();
        let (chunks, _) = bytes.as_chunks::<WORD_BYTES>();
        let words: Vec<u64> = chunks.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let mut refused = 0;
        for at in 2..words.len() - 1 {
            for value in [0, 1, u64::MAX, 1 << 44, words[at] ^ 1] {
                let mut forged = words.clone();
                forged[at] = value;
                let end = forged.len() - 1;
                forged[end] = checksum(&forged[..end]);
                let bytes: Vec<u8> = forged.into_iter().flat_map(u64::to_le_bytes).collect();
                refused += u32::from(Index::restore(LIMITS, &bytes).is_err());
            }
        }
        assert!(refused > 30, "{refused}");
    }

    /// Under smaller limits a restore must leave something out, not grow.
    #[test]
    fn a_restore_stays_within_its_limit() {
        let index = Index::new(LIMITS);
        for number in 0..800 {
            index.store(HolderId(1), TierSet::HBM, None, &chain(number, 100)).unwrap();
        }
        let limits = Limits { bytes: 2 << 20, ..LIMITS };
        let restored = Index::restore(limits, &index.snapshot()).unwrap();
        let counts = restored.counts();
        assert!(counts.bytes <= limits.bytes, "{counts:?}");
        assert!(counts.evicted > 0 && counts.blocks > 10_000, "{counts:?}");
    }
}
