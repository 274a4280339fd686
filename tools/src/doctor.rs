//! `doctor`: what about this machine makes Terrace slower than need be.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use rustix::process::{Resource, getrlimit};
use serde_json::{Value, json};
use terrace_proto::v1::{InfoRequest, InfoResponse, Tier, TierInfo};

use crate::admin::{DEGRADED, tier_words};
use crate::cli::Target;
use crate::connect;
use crate::output::{self, Format};

/// How a fact bears on Terrace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// As it should be.
    Good,
    /// Works, but slower or with less.
    Slow,
    /// Terrace does not run.
    Bad,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Slow => "slower",
            Self::Bad => "BAD",
        }
    }
}

struct Fact {
    name: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do; empty when good.
    mend: &'static str,
}

/// Exit code 1 when something keeps Terrace from running.
pub(crate) async fn run(target: &Target, format: Format) -> anyhow::Result<ExitCode> {
    let facts = [
        kernel(),
        vector_unit(),
        io_uring(),
        memlock(),
        huge_pages(),
        shared_memory_huge_pages(),
        memory(),
        open_files(),
        python(),
    ];
    let notes = daemon_notes(target).await;
    if format == Format::Json {
        let facts = facts.iter().map(|fact| {
            json!({ "name": fact.name, "verdict": fact.verdict.name(), "found": fact.found, "mend": fact.mend })
        });
        output::json(&json!({ "facts": facts.collect::<Vec<Value>>(), "daemon": notes }))?;
    } else {
        for fact in &facts {
            println!("{:<7} {:<16} {}", fact.verdict.name(), fact.name, fact.found);
            if !fact.mend.is_empty() {
                println!("{:<24} mend: {}", "", fact.mend);
            }
        }
        match notes {
            Some(notes) => {
                println!("\nThe running daemon says:");
                notes.iter().for_each(|note| println!("- {note}"));
            }
            None => println!("\nNo daemon answers; with one running, its own findings follow here."),
        }
    }
    let bad = facts.iter().any(|fact| fact.verdict == Verdict::Bad);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn daemon_notes(target: &Target) -> Option<Vec<String>> {
    let mut admin = connect::admin(target).await.ok()?;
    Some(said(admin.info(InfoRequest {}).await.ok()?.into_inner()))
}

/// What is wrong with a daemon, what it found, and its devices of Hbm.
fn said(info: InfoResponse) -> Vec<String> {
    let degraded = info.degraded.then(|| DEGRADED.to_owned());
    let device = |tier: &TierInfo| match tier.tier() {
        Tier::Hbm => Some(format!("Hbm: {}", hbm_fact(tier))),
        _ => (!tier.on).then(|| tier_words(tier)),
    };
    let devices: Vec<String> = info.tiers.iter().filter_map(device).collect();
    degraded.into_iter().chain(info.notes).chain(devices).collect()
}

/// A device of Hbm in a sentence, and what makes it slower than need be.
fn hbm_fact(tier: &TierInfo) -> String {
    let activity = tier.activity.unwrap_or_default();
    let name = if tier.device.is_empty() { String::new() } else { format!("{}: ", tier.device) };
    let slow = if tier.on && activity.registered_bytes == 0 {
        "; no host memory is registered, so copies take the slower way (raise `ulimit -l`; none exists before the first block)"
    } else {
        ""
    };
    format!("{name}{}{slow}", tier.note)
}

/// First line of a file of /proc or /sys; empty when it is not there.
fn line(path: &str) -> String {
    fs::read_to_string(path).ok().and_then(|text| text.lines().next().map(str::to_owned)).unwrap_or_default()
}

/// A field of a `Name: value kB` file, in bytes.
fn field_bytes(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let mut words = rest.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    Some(if words.next() == Some("kB") { number.saturating_mul(1024) } else { number })
}

fn kernel() -> Fact {
    let release = line("/proc/sys/kernel/osrelease");
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let good = version >= (6, 1);
    Fact {
        name: "kernel",
        verdict: if good { Verdict::Good } else { Verdict::Slow },
        found: format!("Linux {release}"),
        mend: if good { "" } else { "Linux 6.1 or newer, for single-issuer rings" },
    }
}

fn vector_unit() -> Fact {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|found| found == flag);
    let (verdict, found, mend) = if has("avx512f") && has("avx512bw") {
        (Verdict::Good, "AVX-512", "")
    } else if has("avx2") && has("fma") && has("f16c") {
        (Verdict::Good, "AVX2, FMA, F16C", "")
    } else {
        (Verdict::Slow, "no AVX2 and FMA: workers use plain arithmetic", "a CPU with AVX2, or a GPU engine")
    };
    Fact { name: "vector unit", verdict, found: found.to_owned(), mend }
}

fn io_uring() -> Fact {
    let switch = line("/proc/sys/kernel/io_uring_disabled");
    let filtered = fs::read_to_string("/proc/self/status")
        .is_ok_and(|text| text.lines().any(|line| line.starts_with("Seccomp:") && line.ends_with('2')));
    let (verdict, found, mend) = match switch.as_str() {
        "2" => (Verdict::Slow, "switched off for everybody", "sysctl kernel.io_uring_disabled=0"),
        "1" => (Verdict::Slow, "for privileged processes only", "sysctl kernel.io_uring_disabled=0"),
        _ if filtered => (
            Verdict::Slow,
            "allowed by the kernel, but a seccomp filter is active and may refuse it",
            "run the container with a profile that allows io_uring; `info` says what is used",
        ),
        _ => (Verdict::Good, "allowed", ""),
    };
    Fact { name: "io_uring", verdict, found: found.to_owned(), mend }
}

fn memlock() -> Fact {
    let limit = getrlimit(Resource::Memlock).current;
    // A registered chunk of 64 MiB counts against the limit on most kernels.
    let good = limit.is_none_or(|bytes| bytes >= 1 << 30);
    Fact {
        name: "memlock",
        verdict: if good { Verdict::Good } else { Verdict::Slow },
        found: limit
            .map_or("unlimited".to_owned(), |bytes| format!("{} may be locked", output::bytes(bytes))),
        mend: if good { "" } else { "ulimit -l unlimited, or LimitMEMLOCK=infinity in systemd" },
    }
}

fn huge_pages() -> Fact {
    let total = field_bytes("/proc/meminfo", "HugePages_Total").unwrap_or(0);
    let free = field_bytes("/proc/meminfo", "HugePages_Free").unwrap_or(0);
    let size = field_bytes("/proc/meminfo", "Hugepagesize").unwrap_or(0);
    let good = free > 0;
    Fact {
        name: "huge pages",
        verdict: if good { Verdict::Good } else { Verdict::Slow },
        found: format!("{free} of {total} free, {} each", output::bytes(size)),
        mend: if good { "" } else { "sysctl vm.nr_hugepages=N, N x 2 MiB of the pool" },
    }
}

fn shared_memory_huge_pages() -> Fact {
    let setting = line("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let chosen = setting.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned();
    let good = matches!(chosen.as_str(), "always" | "within_size" | "advise" | "force");
    Fact {
        name: "shmem pages",
        verdict: if good { Verdict::Good } else { Verdict::Slow },
        found: format!("transparent huge pages for shared memory: {chosen}"),
        mend: if good { "" } else { "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled" },
    }
}

fn memory() -> Fact {
    let available = field_bytes("/proc/meminfo", "MemAvailable").unwrap_or(0);
    let (verdict, mend) = match available {
        0..0x2000_0000 => (Verdict::Bad, "free some memory: the model and the smallest pool need 512 MiB"),
        0x2000_0000..0x8000_0000 => (Verdict::Slow, "a pool of at least 1 GiB keeps more prompts"),
        _ => (Verdict::Good, ""),
    };
    Fact { name: "memory", verdict, found: format!("{} available", output::bytes(available)), mend }
}

fn open_files() -> Fact {
    // The daemon takes what it may.
    let limit = getrlimit(Resource::Nofile).maximum;
    let good = limit.is_none_or(|files| files >= 4096);
    Fact {
        name: "open files",
        verdict: if good { Verdict::Good } else { Verdict::Slow },
        found: limit.map_or("unlimited".to_owned(), |files| files.to_string()),
        mend: if good {
            ""
        } else {
            "ulimit -Hn 65536, or LimitNOFILE=65536 in systemd: each chunk of the pool is three open files"
        },
    }
}

fn python() -> Fact {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|dir| dir.join("python3"))
        .find(|path: &std::path::PathBuf| path.is_file());
    let good = found.is_some();
    Fact {
        name: "python3",
        verdict: if good { Verdict::Good } else { Verdict::Slow },
        found: found.as_deref().map_or("missing".to_owned(), |path: &Path| path.display().to_string()),
        mend: if good { "" } else { "apt install python3-pip (fetches the default model), or use --model" },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever asks what is wrong must hear of a catalog that failed and of a device that was taken out.
    #[test]
    fn a_daemon_that_is_not_well_says_so() {
        let tier = |on, note: &str| TierInfo {
            tier: Tier::Nvme.into(),
            on,
            device: "a.dat".to_owned(),
            note: note.to_owned(),
            ..TierInfo::default()
        };
        let notes = vec!["first start".to_owned()];
        let tiers = vec![tier(true, ""), tier(false, "taken out 3 s ago")];
        let well =
            InfoResponse { notes: notes.clone(), tiers: tiers[..1].to_vec(), ..InfoResponse::default() };
        assert_eq!(said(well), notes);
        let words = said(InfoResponse { degraded: true, notes, tiers, ..InfoResponse::default() });
        assert_eq!(words, [DEGRADED, "first start", "Nvme: off: a.dat; taken out 3 s ago"]);
    }

    /// Containers hide files of /proc and /sys; no finding may panic on what is there or missing.
    #[test]
    fn every_fact_can_be_had_here() {
        assert_eq!(line("/proc/no/such/file"), "");
        assert_eq!(field_bytes("/proc/meminfo", "NoSuchField"), None);
        let facts =
            [kernel(), vector_unit(), io_uring(), memlock(), huge_pages(), shared_memory_huge_pages()];
        for fact in facts {
            assert_eq!(fact.verdict == Verdict::Good, fact.mend.is_empty(), "{}", fact.name);
        }
        assert!(field_bytes("/proc/meminfo", "MemTotal").unwrap() > 1 << 20);
    }
}
