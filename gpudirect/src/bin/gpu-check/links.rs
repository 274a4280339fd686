//! Host memory and device: batches of blocks through the engine against large plain
//! copies of the same direction, and both directions at once.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use terrace_core::{ByteCount, IoClass, MIB};
use terrace_gpudirect::{
    Chunk, Copies, CopyLimits, Device, DeviceBytes, DeviceError, DeviceKind, Direction, Ends, HostBytes, Job,
    JobId, Lane, Piece, Pinned, SLICE_BYTES, Span,
};

use crate::rows::{Rows, median};

pub(crate) const NAMES: &[&str] = &[
    "host_to_device_plain",
    "device_to_host_plain",
    "both_directions_plain",
    "device_to_device_plain",
    "host_to_device_2097152",
    "device_to_host_2097152",
    "both_directions_2097152",
    "host_to_device_368640",
    "device_to_host_368640",
    "both_directions_368640",
    "host_to_device_2097152_unregistered",
];

const BLOCKS: [u64; 2] = [2 * MIB, 368_640];
/// Of each side, so that both directions have memory of their own. A plain copy is one slice.
const MEMORY: u64 = 512 * MIB;
const PLAIN: u64 = 64 * MIB;
/// Bytes of a batch: a lease's worth of blocks.
const BATCH: u64 = 32 * MIB;
/// Odd, so that a median is a round.
const ROUNDS: usize = 5;
const WITHIN: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Tally {
    ends: Mutex<(usize, Option<DeviceError>)>,
    changed: Condvar,
}

impl Ends for Tally {
    fn answered(&self, _id: JobId, result: Result<(), DeviceError>) {
        if let Err(error) = result {
            self.ends.lock().unwrap_or_else(PoisonError::into_inner).1.get_or_insert(error);
        }
    }

    fn released(&self, _id: JobId) {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).0 += 1;
        self.changed.notify_all();
    }
}

impl Tally {
    fn wait(&self, jobs: usize) -> Result<(), DeviceError> {
        let until = Instant::now() + WITHIN;
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        while ends.0 < jobs {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(DeviceError::Late(WITHIN));
            }
            ends = self.changed.wait_timeout(ends, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let (_, error) = std::mem::take(&mut *ends);
        error.map_or(Ok(()), Err)
    }
}

struct Course {
    device: Arc<dyn Device>,
    pinned: Arc<Pinned>,
    copies: Copies,
    tally: Arc<Tally>,
    /// For copies to the device, and for copies from it.
    chunks: [Arc<Chunk>; 2],
    memory: [HostBytes; 2],
}

/// Figures of one round, in GB/s.
type Round = Vec<(String, f64)>;

/// Rates of plain copies in GB/s, as ceilings of what else is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Links {
    pub(crate) to_device: f64,
    pub(crate) within_device: f64,
}

pub(crate) fn measure(device: &Arc<dyn Device>, rows: &mut Rows, until: Instant) -> Option<Links> {
    let course = match Course::new(device) {
        Ok(course) => course,
        Err(error) => {
            NAMES.iter().for_each(|name| rows.fail(name, &error.to_string()));
            return None;
        }
    };
    if let Err(error) = course.verify() {
        rows.fail("bytes_come_back", &error.to_string());
        return None;
    }
    let mut rounds: Vec<Round> = Vec::new();
    // The stand-in has no link: its figures show that the code runs, and once is enough for that.
    let judged = device.info().kind == DeviceKind::Cuda;
    for _ in 0..if judged { ROUNDS } else { 1 } {
        if Instant::now() > until && !rounds.is_empty() {
            break;
        }
        match course.round() {
            Ok(round) => rounds.push(round),
            Err(error) => {
                rows.fail("copies", &error.to_string());
                return None;
            }
        }
    }
    let figure = |name: &str| {
        let of_round = |round: &Round| round.iter().find(|(of, _)| of == name).map(|(_, rate)| *rate);
        median(&rounds.iter().filter_map(of_round).collect::<Vec<_>>())
    };
    for name in NAMES.iter().filter(|name| name.ends_with("_plain")) {
        rows.plain(name, figure(name), "GB/s");
    }
    for name in NAMES.iter().filter(|name| !name.ends_with("_plain")) {
        let (ceiling, bar) = if name.starts_with("both") {
            ("both_directions_plain", Some(0.9))
        } else if name.starts_with("device_to_host") {
            ("device_to_host_plain", Some(0.95))
        } else {
            ("host_to_device_plain", (!name.ends_with("unregistered")).then_some(0.95))
        };
        rows.part_of(name, figure(name), figure(ceiling), bar.filter(|_| judged), "GB/s");
    }
    Some(Links { to_device: figure("host_to_device_plain"), within_device: figure("device_to_device_plain") })
}

impl Course {
    fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let memory = || {
            HostBytes::anonymous(ByteCount::new(MEMORY))
                .map_err(|error| DeviceError::Driver { call: "mmap", detail: error.to_string() })
        };
        let memory = [memory()?, memory()?];
        let pinned = Arc::new(Pinned::new(Arc::clone(device), SLICE_BYTES));
        for part in &memory {
            let bytes: Vec<u8> =
                (0..part.len()).map(|at| u8::try_from((at * 31 + at / 4096) % 251).unwrap_or(0)).collect();
            part.copy_from(&bytes);
            let added = pinned.add(part);
            if let Some(error) = added.why {
                return Err(error);
            }
        }
        let tally = Arc::new(Tally::default());
        let ends = Arc::clone(&tally) as Arc<dyn Ends>;
        let copies = Copies::start(Arc::clone(device), Arc::clone(&pinned), CopyLimits::ONE_LINK, ends)?;
        let chunk = || device.create(ByteCount::new(MEMORY));
        let chunks = [chunk()?, chunk()?];
        Ok(Self { device: Arc::clone(device), pinned, copies, tally, chunks, memory })
    }

    /// A piece that goes `direction` at an offset; each direction has its own chunk and memory.
    fn piece(&self, direction: Direction, offset: u64, bytes: u64) -> Result<Piece, DeviceError> {
        let on = |index: usize, at: u64| {
            DeviceBytes::new(Arc::clone(&self.chunks[index]), at, ByteCount::new(bytes)).map(Span::Device)
        };
        let host = |index: usize| self.memory[index].part(offset, ByteCount::new(bytes)).map(Span::Host);
        match direction {
            Direction::HostToDevice => Piece::new(host(0)?, on(0, offset)?),
            Direction::DeviceToHost => Piece::new(on(1, offset)?, host(1)?),
            Direction::DeviceToDevice | Direction::PeerToPeer => Piece::new(on(0, offset)?, on(1, offset)?),
        }
    }

    /// There, across, and back: the second memory must hold what the first does.
    fn verify(&self) -> Result<(), DeviceError> {
        self.memory[1].copy_from(&vec![0; self.memory[1].len()]);
        for direction in [Direction::HostToDevice, Direction::DeviceToDevice, Direction::DeviceToHost] {
            self.plain(&[direction])?;
        }
        let read = |memory: &HostBytes| {
            let mut bytes = vec![0; memory.len()];
            memory.copy_to(&mut bytes);
            bytes
        };
        if read(&self.memory[0]) == read(&self.memory[1]) {
            Ok(())
        } else {
            Err(DeviceError::Driver { call: "copies there and back", detail: "other bytes came".to_owned() })
        }
    }

    fn round(&self) -> Result<Round, DeviceError> {
        use Direction::{DeviceToDevice, DeviceToHost, HostToDevice};
        let mut round = vec![
            ("host_to_device_plain".to_owned(), self.plain(&[HostToDevice])?),
            ("device_to_host_plain".to_owned(), self.plain(&[DeviceToHost])?),
            ("both_directions_plain".to_owned(), self.plain(&[HostToDevice, DeviceToHost])?),
            ("device_to_device_plain".to_owned(), self.plain(&[DeviceToDevice])?),
        ];
        for block in BLOCKS {
            for (name, directions) in [
                ("host_to_device", &[HostToDevice][..]),
                ("device_to_host", &[DeviceToHost][..]),
                ("both_directions", &[HostToDevice, DeviceToHost][..]),
            ] {
                round.push((format!("{name}_{block}"), self.batches(directions, block)?));
            }
        }
        self.pinned.remove(&self.memory[0]);
        let unregistered = self.batches(&[HostToDevice], BLOCKS[0]);
        self.pinned.add(&self.memory[0]);
        round.push(("host_to_device_2097152_unregistered".to_owned(), unregistered?));
        Ok(round)
    }

    /// All memory by copies as large as a registration, started at once, without the engine.
    fn plain(&self, directions: &[Direction]) -> Result<f64, DeviceError> {
        let mut batches = Vec::new();
        for direction in directions {
            let offsets = (0..MEMORY).step_by(usize::try_from(PLAIN).unwrap_or(usize::MAX));
            let pieces = offsets.map(|offset| self.piece(*direction, offset, PLAIN));
            batches.push((*direction, pieces.collect::<Result<Arc<[Piece]>, _>>()?));
        }
        let began = Instant::now();
        let mut marks = Vec::new();
        for (direction, pieces) in batches {
            let lane = Lane { direction, class: IoClass::PrefillFetch };
            marks.push(self.device.start(lane, pieces)?);
        }
        for mark in &mut marks {
            while !mark.ended()? {
                if began.elapsed() > WITHIN {
                    return Err(DeviceError::Late(WITHIN));
                }
                std::thread::sleep(Duration::from_micros(20));
            }
        }
        Ok(rate(MEMORY * directions.len() as u64, began.elapsed()))
    }

    /// All memory by blocks, in batches, through the engine; the directions take turns.
    fn batches(&self, directions: &[Direction], block: u64) -> Result<f64, DeviceError> {
        let per_batch = BATCH / block;
        let blocks = MEMORY / block;
        let mut jobs = Vec::new();
        for first in (0..blocks).step_by(usize::try_from(per_batch).unwrap_or(1)) {
            for direction in directions {
                let offsets = (first..blocks.min(first + per_batch)).map(|index| index * block);
                let pieces = offsets.map(|offset| self.piece(*direction, offset, block));
                let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
                jobs.push(Job { id: JobId(first), class: IoClass::PrefillFetch, pieces, within: WITHIN });
            }
        }
        let count = jobs.len();
        let began = Instant::now();
        for job in jobs {
            self.copies.submit(job).map_err(|refused| refused.error)?;
        }
        self.tally.wait(count)?;
        Ok(rate(blocks * block * directions.len() as u64, began.elapsed()))
    }
}

/// In GB/s.
fn rate(bytes: u64, time: Duration) -> f64 {
    let mebibytes = u32::try_from(bytes >> 20).map_or(f64::MAX, f64::from);
    mebibytes * 1.048_576e-3 / time.as_secs_f64().max(1e-9)
}
