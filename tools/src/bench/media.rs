//! `bench media`: reads and writes of blocks through media, as the daemon makes
//! them (header page, checksum, scheduler, completion), against a bare io_uring
//! loop over the same memory, file and offsets, and against fio.
//!
//! Depth is what the device has at once, for all of them. Rounds are interleaved and medians are compared. A second bare
//! loop compares what it reads with its checksum, as media does: what it loses against the first is the price of looking
//! at the bytes on this machine, where the processor and the device share one memory. Write amplification is that of a
//! whole daemon.

mod churn;
mod fio;
mod rig;

use anyhow::Context;
use terrace_core::{GIB, MIB};
use terrace_media::bare::BareOp;

use super::{Line, Options, blocks, median, stand};
use rig::{Frames, Kind, Rig};

/// Payloads that are measured: the block of a small model, and that of a large one.
const BLOCKS: [u64; 2] = [blocks::MODEL_BLOCK_BYTES, 2 * MIB];
const DEPTHS: [usize; 4] = [1, 4, 16, 32];
/// Odd, so that a median is a round.
const ROUNDS: usize = 9;
/// Bytes of one round of one engine.
const ROUND_BYTES: u64 = 512 * MIB;
/// Part of the bare loop's rate and of fio's that media must reach.
const BARE_BAR: f64 = 0.95;
const FIO_BAR: f64 = 0.97;
/// CPU seconds a GiB read that media may use beyond the checksum.
const CPU_MAX: f64 = 0.025;
/// Depth at which CPU time is judged: at less, most of it is the kernel going to sleep and waking up.
const CPU_DEPTH: usize = 16;

pub(super) async fn run(options: &Options) -> anyhow::Result<Vec<Line>> {
    let dir = stand::temp_dir(options)?;
    let path = dir.path().to_owned();
    // It blocks for minutes.
    let measured = tokio::task::spawn_blocking(move || {
        let mut lines = Vec::new();
        for block_bytes in BLOCKS {
            lines.extend(one_size(&path, block_bytes)?);
        }
        anyhow::Ok(lines)
    });
    let mut lines = measured.await??;
    drop(dir);
    lines.extend(churn::run(options).await?);
    Ok(lines)
}

/// Rates in GiB/s and CPU seconds a GiB of each round.
#[derive(Default)]
struct Rounds {
    media: Vec<f64>,
    media_cpu: Vec<f64>,
    bare: Vec<f64>,
    bare_cpu: Vec<f64>,
    checked: Vec<f64>,
    checked_cpu: Vec<f64>,
    fio: Vec<f64>,
    /// Media with as few frames as fio has buffers.
    few: Vec<f64>,
}

fn one_size(dir: &std::path::Path, block_bytes: u64) -> anyhow::Result<Vec<Line>> {
    let mut rig = Rig::new(dir, block_bytes).context("cannot set up the media to be measured")?;
    eprintln!("blocks of {block_bytes} bytes in {}", rig.pages());
    let name = block_bytes.to_string();
    let checksum = rig.checksum_seconds_per_gib()?;
    let mut lines = vec![Line::plain(&format!("media_{name}_checksum_cpu"), checksum, "s/GiB")];
    // It takes minutes: what is known already is said.
    let say = |lines: &[Line]| lines.iter().for_each(Line::say);
    say(&lines);
    for kind in [Kind::Read, Kind::Write] {
        for depth in DEPTHS {
            let rounds = compare(&mut rig, kind, depth)?;
            let known = lines.len();
            lines.extend(judge(&rounds, &format!("media_{name}_{}_{depth}", kind.label()), kind));
            if kind == Kind::Read {
                let cpu = median(&rounds.media_cpu);
                let cpu_name = format!("media_{name}_read_{depth}_cpu");
                let bare = median(&rounds.bare_cpu);
                let checked = median(&rounds.checked_cpu);
                lines.push(Line::plain(&format!("{cpu_name}_bare"), bare, "s/GiB"));
                lines.push(Line::plain(&format!("{cpu_name}_checked"), checked, "s/GiB"));
                lines.push(if depth >= CPU_DEPTH {
                    Line::at_most(&cpu_name, cpu, CPU_MAX + checksum, "s/GiB")
                } else {
                    Line::plain(&cpu_name, cpu, "s/GiB")
                });
            }
            say(&lines[known..]);
        }
    }
    Ok(lines)
}

fn compare(rig: &mut Rig, kind: Kind, depth: usize) -> anyhow::Result<Rounds> {
    let count = usize::try_from(ROUND_BYTES / rig.frame_bytes())?;
    let mut rounds = Rounds::default();
    let moved = float(count as u64 * rig.frame_bytes()) / float(GIB);
    let block = float(rig.frame_bytes()) / float(GIB);
    for round in 0..ROUNDS {
        // Who goes first changes, so that nobody always finds what another left.
        for turn in 0..5 {
            match (round + turn) % 5 {
                0 => {
                    let (seconds, cpu) = rig.media((kind, Frames::All), depth, count, round)?;
                    rounds.media.push(moved / seconds);
                    rounds.media_cpu.push(cpu / block);
                }
                1 => {
                    let (seconds, cpu) = rig.bare(kind.bare(), depth, count, round)?;
                    rounds.bare.push(moved / seconds);
                    rounds.bare_cpu.push(cpu / block);
                }
                2 if kind == Kind::Read => {
                    let (seconds, cpu) = rig.bare(BareOp::ReadChecked, depth, count, round)?;
                    rounds.checked.push(moved / seconds);
                    rounds.checked_cpu.push(cpu / block);
                }
                2 => {}
                3 => {
                    let (seconds, _) = rig.media((kind, Frames::Few), depth, count, round)?;
                    rounds.few.push(moved / seconds);
                }
                _ => rounds.fio.extend(fio::run(rig, kind, depth)?),
            }
        }
    }
    Ok(rounds)
}

fn judge(rounds: &Rounds, name: &str, kind: Kind) -> Vec<Line> {
    let rate = |name: &str, values: &[f64], limits: &[f64], bar| {
        Line::part_of_rounds(name, values, limits, bar, "GiB/s")
    };
    let mut lines = vec![rate(name, &rounds.media, &rounds.bare, BARE_BAR)];
    if kind == Kind::Read {
        let checked = Line::compared(
            &format!("{name}_checked"),
            median(&rounds.media),
            median(&rounds.checked),
            "GiB/s",
        );
        lines.push(checked);
    }
    if rounds.fio.is_empty() {
        eprintln!("fio is not installed, or cannot {} here: not compared", kind.label());
    } else {
        lines.push(rate(&format!("{name}_fio"), &rounds.few, &rounds.fio, FIO_BAR));
    }
    lines
}

/// Exact below 2^53.
#[allow(clippy::cast_precision_loss, reason = "rates need no more than 53 bits")]
fn float(value: u64) -> f64 {
    value as f64
}
