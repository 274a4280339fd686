//! Reads from the Nvme tier's files straight into a device's frames, by cuFile.
//!
//! Promises: a read that is not taken, fails, or brings other bytes is told to the
//! core as such, which then takes the way through Pinned; where the self-test
//! found that way quicker for a size, nothing is given to cuFile. Where it found
//! cuFile quicker, jobs are given in the manner that it found quickest.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use terrace_core::{BlockHeader, ByteCount, DeviceId, Fault, KIB, MIB, OpId};
use terrace_gpudirect::{
    Device, DeviceError, Ends, FileChoice, FileJob, FileLimits, FileOperation, Gds, GdsFile, Submission,
    measure_files,
};
use terrace_media::PAGE_BYTES;

use super::landing::{Check, Landing, Next, Place, Transfer};
use crate::config::UseGds;

/// Calls of the library at once, and what may wait for them.
const LIMITS: FileLimits = FileLimits { threads: 4, jobs_max: 256, silence_max: Duration::from_secs(10) };
/// A read that takes longer is a failure. Its frame stays taken until the library is done with it.
const READ_WITHIN: Duration = Duration::from_secs(5);
/// Sizes that the self-test tries, and how long it may take.
const SIZES: [u64; 4] = [64 * KIB, 360 * KIB, 2 * MIB, 8 * MIB];
const MEASURE_WITHIN: Duration = Duration::from_secs(12);

/// cuFile over one device.
pub(crate) struct Direct {
    gds: Gds,
    files: Vec<Option<Arc<GdsFile>>>,
    /// Absent until the self-test has ended: nothing is read this way before.
    choice: Arc<OnceLock<Result<FileChoice, DeviceError>>>,
    always: bool,
    reads: AtomicU64,
    fallen_back: Arc<AtomicU64>,
}

impl Direct {
    /// Opens the library and the files, and starts the self-test.
    ///
    /// # Errors
    /// Why cuFile cannot be had here, which costs speed alone.
    pub(crate) fn open(
        device: &Arc<dyn Device>,
        wanted: UseGds,
        (folder, paths): (&Path, &[PathBuf]),
        landing: &Arc<Landing>,
    ) -> Result<Self, DeviceError> {
        if wanted == UseGds::Off {
            return Err(DeviceError::Unsupported { what: "cuFile, because `hbm.gds` is off".to_owned() });
        }
        let gds = Gds::open(device, LIMITS, Arc::clone(landing) as Arc<dyn Ends>)?;
        let open = |path: &PathBuf| {
            let opened = gds.open_to_read(path);
            opened
                .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "not read by cuFile"))
                .ok()
        };
        let files: Vec<Option<Arc<GdsFile>>> = paths.iter().map(open).collect();
        let choice = Arc::new(OnceLock::new());
        let always = wanted == UseGds::On;
        if !always {
            measure(Arc::clone(device), folder.to_owned(), Arc::clone(&choice))?;
        }
        let fallen_back = Arc::new(AtomicU64::new(0));
        Ok(Self { gds, files, choice, always, reads: AtomicU64::new(0), fallen_back })
    }

    /// For `info`.
    pub(crate) fn describe(&self) -> String {
        let info = self.gds.info();
        let mode = if info.is_direct { "direct" } else { "compat mode, through host memory of its own" };
        let sizes = match self.choice.get() {
            _ if self.always => "for all blocks".to_owned(),
            None => "not yet measured".to_owned(),
            Some(Err(error)) => format!("not measured and not used ({error})"),
            Some(Ok(choice)) => sizes(choice),
        };
        format!("cuFile {mode}: {sizes}")
    }

    /// Reads that were given to the library, and those of them that the other way had to repeat.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.reads.load(Ordering::Relaxed), self.fallen_back.load(Ordering::Relaxed))
    }

    /// How a block is read by the library, if at all.
    fn way(&self, bytes: ByteCount) -> Option<Submission> {
        if self.always {
            return Some(Submission::Calls);
        }
        self.choice.get()?.as_ref().ok()?.submission(bytes)
    }

    /// Starts a read, or answers that it was not started.
    pub(crate) fn read(
        &self,
        op: OpId,
        (source, offset): (DeviceId, u64),
        target: Place,
        expect: BlockHeader,
        landing: &Arc<Landing>,
    ) {
        let file = self.files.get(usize::from(source.get())).and_then(Option::as_ref);
        let (Some(file), Some(submission)) = (file, self.way(expect.length)) else {
            return landing.check(Check::Answer(op, Err(Fault::NotStarted)));
        };
        let whole = expect.length.round_up(PAGE_BYTES).unwrap_or(expect.length);
        let bytes = match &target {
            Place::Device(held, index) => held.payload(*index, whole),
            Place::Host(..) | Place::Between(_) | Place::File => {
                Err(DeviceError::BadJob { detail: "no memory of a device" })
            }
        };
        let fallen_back = Arc::clone(&self.fallen_back);
        let (told, transfer) = (Arc::clone(landing), Transfer { op, source: Place::File, target, expect });
        let next = Next::Onwards(Box::new(move |result: Result<(), DeviceError>| {
            if result.is_err() {
                fallen_back.fetch_add(1, Ordering::Relaxed);
            }
            told.check(Check::Landed(Next::Compare(transfer), result));
        }));
        let id = landing.begin(next);
        self.reads.fetch_add(1, Ordering::Relaxed);
        let submitted = bytes.and_then(|bytes| {
            let (operation, file) = (FileOperation::Read, Arc::clone(file));
            let (offset, within) = (offset + PAGE_BYTES, READ_WITHIN);
            let job = FileJob { id, operation, submission, file, offset, bytes, within };
            self.gds.submit(job).map_err(|refused| refused.error)
        });
        if let Err(error) = submitted {
            landing.turned_away(id, error);
        }
    }
}

/// The sizes that go by cuFile, and how; or why none does.
fn sizes(choice: &FileChoice) -> String {
    let quicker = choice.rates.iter().filter_map(|rate| Some((rate.block, rate.choice()?)));
    let sizes: Vec<String> =
        quicker.map(|(block, way)| format!("{} KiB by {}", block.get() / KIB, way.label())).collect();
    if !sizes.is_empty() {
        return sizes.join(", ");
    }
    let errors = choice.rates.iter().flat_map(|rate| &rate.direct);
    match errors.filter_map(|(_, rate)| rate.as_ref().err()).next() {
        Some(error) if choice.rates.iter().all(|rate| rate.best().is_none()) => format!("not used ({error})"),
        Some(_) | None => "slower at every size, not used".to_owned(),
    }
}

fn measure(
    device: Arc<dyn Device>,
    folder: PathBuf,
    choice: Arc<OnceLock<Result<FileChoice, DeviceError>>>,
) -> Result<(), DeviceError> {
    let sizes = SIZES.map(ByteCount::new);
    super::gpu::spawn("hbm-measure".to_owned(), move || {
        let found = measure_files(&device, &folder, &sizes, MEASURE_WITHIN);
        if let Err(error) = &found {
            tracing::warn!(%error, "cuFile could not be measured and is not used");
        }
        // There is one self-test in a life.
        drop(choice.set(found));
    })
}
