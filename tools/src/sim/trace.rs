//! Recorded traffic: JSON lines, plain or compressed with zstd.
//!
//! One line is one request: `timestamp` (milliseconds), `input_length` and
//! `output_length` (tokens), `hash_ids` (one number a block of the prompt; the
//! same number means the same prefix up to and including that block), and
//! perhaps `session_id`. [`Lines`] reads them one at a time; [`Trace`] keeps
//! them compactly, so that a sweep reads the file once.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use terrace_core::BlockId;

/// Longest line. A prompt of a million blocks is far below it.
const LINE_BYTES_MAX: u64 = 64 << 20;
/// Most blocks of all prompts of a trace that is kept in memory: 4 bytes each.
const BLOCKS_MAX: usize = 1 << 30;
/// Most tokens in a prompt or an answer.
const TOKENS_MAX: u64 = 1 << 31;
/// First bytes of a zstd frame.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// First bytes of a gzip file.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// Whether a session is drawn is told in steps of one in so many.
const DRAWS: f64 = 1_000_000.0;
/// Block sizes that are tried when the caller names none.
const TOKENS_PER_BLOCK: [u32; 10] = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192];

/// One line of a trace.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Line {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
    #[serde(default)]
    session_id: Option<Session>,
}

/// A session is named by a number or a text.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(untagged)]
enum Session {
    Number(u64),
    Text(String),
}

/// Reads a trace line by line.
pub(crate) struct Lines {
    path: PathBuf,
    source: BufReader<Box<dyn Read + Send>>,
    compressed: bool,
    number: u64,
    line: String,
}

impl Lines {
    /// # Errors
    /// When the file cannot be read or is no zstd frame although it begins like one.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let unreadable = || format!("cannot read the trace {}", path.display());
        let mut file = BufReader::with_capacity(1 << 18, File::open(path).with_context(unreadable)?);
        let start = file.fill_buf().with_context(unreadable)?;
        ensure!(
            !start.starts_with(&GZIP_MAGIC),
            "{} is compressed with gzip; traces are JSON lines, plain or zstd: unpack it (gunzip)",
            path.display()
        );
        let compressed = start.starts_with(&ZSTD_MAGIC);
        let source: Box<dyn Read + Send> = if compressed {
            let decoder = ruzstd::decoding::StreamingDecoder::new(file);
            Box::new(decoder.with_context(|| damaged(path))?)
        } else {
            Box::new(file)
        };
        let source = BufReader::with_capacity(1 << 18, source);
        Ok(Self { path: path.to_owned(), source, compressed, number: 0, line: String::new() })
    }

    /// Reads a line. `None` at the end.
    fn read_line(&mut self) -> anyhow::Result<Option<Line>> {
        loop {
            self.number += 1;
            self.line.clear();
            let read = self.source.by_ref().take(LINE_BYTES_MAX).read_line(&mut self.line);
            let length = read.map_err(|error| self.unreadable(error))?;
            if length == 0 {
                return Ok(None);
            }
            if length as u64 == LINE_BYTES_MAX && !self.line.ends_with('\n') {
                bail!("{}: the line is longer than {LINE_BYTES_MAX} bytes", self.place());
            }
            if !self.line.trim().is_empty() {
                break;
            }
        }
        let line: Line = serde_json::from_str(&self.line).with_context(|| {
            format!(
                "{}: expected a JSON object with timestamp, input_length, output_length, hash_ids",
                self.place()
            )
        })?;
        let sound = line.timestamp.is_finite() && line.timestamp >= 0.0 && line.timestamp < 1e15;
        ensure!(sound, "{}: timestamp {} is no number of milliseconds", self.place(), line.timestamp);
        let tokens = line.input_length.max(line.output_length);
        ensure!(tokens <= TOKENS_MAX, "{}: {tokens} tokens; the limit is {TOKENS_MAX}", self.place());
        ensure!(
            line.input_length > 0,
            "{}: input_length is 0; a prompt has at least one token",
            self.place()
        );
        Ok(Some(line))
    }

    /// What is wrong with the file, and what to do. Text that is no UTF-8 is `InvalidData`.
    fn unreadable(&self, error: std::io::Error) -> anyhow::Error {
        let text = error.kind() == std::io::ErrorKind::InvalidData;
        let what = match (text, self.compressed) {
            (true, _) => format!("{}: this is no text; traces are JSON lines, plain or zstd", self.place()),
            (false, true) => format!("{}: {}", self.place(), damaged(&self.path)),
            (false, false) => self.place(),
        };
        anyhow::Error::new(error).context(what)
    }

    fn place(&self) -> String {
        format!("{}:{}", self.path.display(), self.number)
    }
}

fn damaged(path: &Path) -> String {
    format!("{} is cut short or damaged (zstd -t tells): fetch or copy it again", path.display())
}

impl Iterator for Lines {
    type Item = anyhow::Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read_line().transpose()
    }
}

/// One request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    /// When it came, in microseconds since the first one.
    pub(crate) at: u64,
    /// Tokens of the prompt.
    pub(crate) input: u64,
    /// Tokens of the answer.
    pub(crate) output: u64,
    /// The request that comes after this one in its session.
    pub(crate) next: Option<u32>,
    /// It is not the first of its session.
    pub(crate) follows: bool,
    begin: usize,
    end: usize,
}

/// A trace in memory, in the order of time.
#[derive(Debug)]
pub(crate) struct Trace {
    /// Name of its file.
    pub(crate) name: String,
    /// Its requests.
    pub(crate) asks: Vec<Ask>,
    /// Tokens of a block.
    pub(crate) tokens_per_block: u32,
    /// The requests name their sessions.
    pub(crate) has_sessions: bool,
    /// Blocks of all requests, by number of the distinct block.
    numbers: Vec<u32>,
    /// Every distinct block.
    ids: Vec<BlockId>,
}

impl Trace {
    /// Reads at most `limit` requests of a file.
    ///
    /// # Errors
    /// When a line is no request, or the tokens of a block cannot be told.
    pub(crate) fn read(
        path: &Path,
        limit: Option<usize>,
        tokens_per_block: Option<u32>,
    ) -> anyhow::Result<Self> {
        let lines = Lines::open(path)?.take(limit.unwrap_or(usize::MAX));
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let name = name.trim_end_matches(".zst").trim_end_matches(".jsonl").to_owned();
        Self::collect(name, lines, tokens_per_block).map_err(|error| {
            let named = error.chain().any(|cause| cause.to_string().contains(&*path.to_string_lossy()));
            if named { error } else { error.context(path.display().to_string()) }
        })
    }

    fn collect(
        name: String,
        lines: impl Iterator<Item = anyhow::Result<Line>>,
        tokens_per_block: Option<u32>,
    ) -> anyhow::Result<Self> {
        let mut known = hashbrown::HashTable::<u32>::new();
        let (mut raw, mut numbers, mut asks, mut sessions) =
            (Vec::<u64>::new(), Vec::new(), Vec::new(), Vec::new());
        for line in lines {
            let line = line?;
            let begin = numbers.len();
            ensure!(
                begin + line.hash_ids.len() <= BLOCKS_MAX,
                "more than {BLOCKS_MAX} blocks in all prompts; replay a part of it by --limit"
            );
            for id in line.hash_ids {
                let entry = known.entry(spread(id), |&n| raw[n as usize] == id, |&n| spread(raw[n as usize]));
                let number = *entry.or_insert_with(|| u32::try_from(raw.len()).unwrap_or(u32::MAX)).get();
                if number as usize == raw.len() {
                    raw.push(id);
                }
                numbers.push(number);
            }
            let end = numbers.len();
            asks.push(Ask {
                at: micros(line.timestamp),
                input: line.input_length,
                output: line.output_length,
                next: None,
                follows: false,
                begin,
                end,
            });
            sessions.push(line.session_id);
        }
        ensure!(!asks.is_empty(), "the trace holds no request");
        let has_sessions = sessions.iter().all(Option::is_some);
        order(&mut asks, &mut sessions);
        let tokens_per_block = match tokens_per_block {
            Some(tokens) => tokens,
            None => infer(&asks).context(
                "cannot tell how many tokens a block has from the lengths of the prompts; say it by --tokens-per-block",
            )?,
        };
        let ids = raw.into_iter().map(block_id).collect();
        Ok(Self { name, asks, tokens_per_block, has_sessions, numbers, ids })
    }

    /// So many times its sessions: further ones do what the recorded ones do, begin at other times of the same span, and
    /// share blocks among themselves as those do, but none with them. Of a part of a time, sessions are drawn.
    ///
    /// # Errors
    /// When requests name no sessions, or there would be more blocks than can be counted.
    pub(crate) fn with_sessions(self, times: f64) -> anyhow::Result<Self> {
        ensure!(self.has_sessions, "{}: requests name no sessions, which --sessions needs", self.name);
        let copies = whole(times.ceil());
        let blocks = self.numbers.len().checked_mul(copies as usize);
        ensure!(
            blocks.is_some_and(|blocks| blocks <= BLOCKS_MAX),
            "{}: more than {BLOCKS_MAX} blocks in all prompts of so many sessions; use a smaller --sessions or --limit",
            self.name
        );
        let distinct = u32::try_from(self.ids.len()).context("too many distinct blocks")?;
        let span = self.asks.iter().filter(|ask| !ask.follows).map(|ask| ask.at).max().unwrap_or(0) + 1;
        let (mut asks, mut sessions) = (Vec::new(), Vec::new());
        let (mut numbers, mut ids) = (Vec::new(), Vec::new());
        for copy in 0..copies {
            let base = copy.checked_mul(distinct).context("too many distinct blocks")?;
            ids.extend((0u64..).zip(&self.ids).map(|(number, &id)| match copy {
                0 => id,
                copy => block_id(spread(u64::from(copy)) ^ number),
            }));
            let share = whole((times - f64::from(copy)).clamp(0.0, 1.0) * DRAWS);
            let is_drawn = |place: usize| u64::from(share) > spread(place as u64) % u64::from(whole(DRAWS));
            // Copies begin between each other, so that as many begin at any time as did.
            let later = u128::from(span) * u128::from(copy) / u128::from(copies);
            let firsts = self.asks.iter().enumerate().filter(|(_, ask)| !ask.follows);
            for (place, first) in firsts.filter(|(place, _)| is_drawn(*place)) {
                let start = u64::try_from((u128::from(first.at) + later) % u128::from(span)).unwrap_or(0);
                for ask in self.turns(first) {
                    let begin = numbers.len();
                    numbers.extend(self.numbers(ask).iter().map(|number| base + number));
                    let at = start + (ask.at - first.at);
                    asks.push(Ask { at, next: None, follows: false, begin, end: numbers.len(), ..*ask });
                    sessions.push(Some(Session::Number(u64::from(copy) << 32 | place as u64)));
                }
            }
        }
        ensure!(!asks.is_empty(), "{}: so few sessions are none", self.name);
        order(&mut asks, &mut sessions);
        Ok(Self { asks, numbers, ids, ..self })
    }

    /// A session from its first request on.
    fn turns<'a>(&'a self, first: &'a Ask) -> impl Iterator<Item = &'a Ask> {
        std::iter::successors(Some(first), |ask| self.asks.get(ask.next? as usize))
    }

    /// Distinct blocks.
    pub(crate) fn distinct(&self) -> u64 {
        self.ids.len() as u64
    }

    /// Every distinct block, by number.
    pub(crate) fn ids(&self) -> &[BlockId] {
        &self.ids
    }

    /// Blocks of all prompts.
    #[cfg(test)]
    pub(crate) fn references(&self) -> u64 {
        self.numbers.len() as u64
    }

    /// Most blocks in one prompt.
    pub(crate) fn longest(&self) -> usize {
        self.asks.iter().map(|ask| ask.end - ask.begin).max().unwrap_or(0)
    }

    /// Numbers of a prompt's blocks among the distinct ones.
    pub(crate) fn numbers(&self, ask: &Ask) -> &[u32] {
        &self.numbers[ask.begin..ask.end]
    }

    /// A prompt's blocks.
    pub(crate) fn blocks(&self, ask: &Ask) -> Vec<BlockId> {
        self.numbers(ask).iter().map(|&number| self.ids[number as usize]).collect()
    }

    /// Tokens of a prompt that its first `blocks` blocks hold.
    pub(crate) fn tokens(&self, ask: &Ask, blocks: usize) -> u64 {
        (blocks as u64 * u64::from(self.tokens_per_block)).min(ask.input)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "callers' numbers are not negative and small"
)]
fn whole(number: f64) -> u32 {
    number as u32
}

/// By time, and each request knows the next one of its session.
fn order(asks: &mut Vec<Ask>, sessions: &mut Vec<Option<Session>>) {
    let mut places: Vec<usize> = (0..asks.len()).collect();
    places.sort_by_key(|&place| asks[place].at);
    let first = asks[places[0]].at;
    *asks = places.iter().map(|&place| Ask { at: asks[place].at - first, ..asks[place] }).collect();
    *sessions = places.iter().map(|&place| sessions[place].clone()).collect();
    let mut last = std::collections::BTreeMap::<&Session, usize>::new();
    for (place, session) in sessions.iter().enumerate() {
        let Some(session) = session else { continue };
        if let Some(before) = last.insert(session, place) {
            asks[before].next = u32::try_from(place).ok();
            asks[place].follows = true;
        }
    }
}

/// The block size that explains how many ids each prompt has: all its whole
/// blocks, and perhaps one for the rest.
fn infer(asks: &[Ask]) -> Option<u32> {
    let fits = |tokens: u64, ask: &Ask| {
        let ids = (ask.end - ask.begin) as u64;
        ids == ask.input / tokens || ids == ask.input.div_ceil(tokens)
    };
    TOKENS_PER_BLOCK.into_iter().find(|&tokens| asks.iter().all(|ask| fits(u64::from(tokens), ask)))
}

/// Spreads an id of a trace over 64 bits: the finalizer of SplitMix64.
fn spread(id: u64) -> u64 {
    let mut bits = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// The block of an id: 128 uniform bits, as the core expects of a block id.
fn block_id(id: u64) -> BlockId {
    let low = spread(id);
    let high = spread(id ^ 0x5851_f42d_4c95_7f2d);
    BlockId::from_bytes((u128::from(high) << 64 | u128::from(low)).to_le_bytes())
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked when it was read: not negative and below 10^15 milliseconds"
)]
fn micros(milliseconds: f64) -> u64 {
    (milliseconds * 1000.0).round() as u64
}

#[cfg(test)]
mod tests;
