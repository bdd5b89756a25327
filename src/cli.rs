//! Owns the command line: commands and flags exactly as typed, sizes in bytes. Parsed by `main`; knows
//! nothing of files and checks nothing but the arguments themselves. Usage errors are clap's and exit with 2.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  mats-stream plan merge.yml                              what would be done, from headers alone
  mats-stream merge merge.yml --out merged                merge and write a Hugging Face directory
  mats-stream merge merge.yml --out merged --max-memory 8GiB --threads 4
  mats-stream inspect models/base --stats                 tensors, norms, NaN and Inf counts
  mats-stream diff merged models/base --tolerance 1e-6    exit 1 where they differ by more
  mats-stream materialise merged 0 --out task0            one task's model of a merge that kept masks
  mats-stream verify merged                               exit 1 where a tensor is not as it was written
  mats-stream statistics convert grams.pt --out s.safetensors --dtype bf16
  mats-stream report merged                               one HTML page of what the merge did

A minimal merge.yml:
  merge_method: linear
  models:
    - model: models/a
    - model: models/b

Exit codes: 0 done; 1 diff or verify found differences; 2 bad input, config or flag;
3 not converged (--require-convergence); 5 out of space; 6 other I/O error; 74 an input changed
while it was read; 75 the output directory is in use; 130, 143 interrupted (merge --resume continues).";

/// Merge fine-tuned neural networks larger than memory
///
/// Fisher, RegMean, K-FAC and data-free merging of safetensors checkpoints by streaming, one parameter at a
/// time.
#[derive(Debug, Clone, Parser)]
#[command(name = "mats-stream", version, about, long_about = None, after_help = EXAMPLES)]
#[command(max_term_width = 110)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// How much is logged to stderr
    #[arg(long, global = true, value_enum, value_name = "LEVEL", default_value_t = LogLevel::Warn)]
    pub log_level: LogLevel,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Merge the models of a config into a new directory
    Merge(MergeArgs),
    /// Show what a merge would do, from headers alone
    Plan(PlanArgs),
    /// List the tensors of a checkpoint or a statistics file
    Inspect(InspectArgs),
    /// Compare two checkpoints tensor by tensor
    Diff(DiffArgs),
    /// Make one task's model of a merge that kept masks (emr, tall_masks)
    ///
    /// DIR is the output directory of the merge. TASK is a model of its config, by its number from 0 (the base
    /// aside) or by name. The base is looked for where the merge found it, or at --base.
    Materialise(MaterialiseArgs),
    /// Check a finished directory against the checksums of its report; exit 1 where anything differs
    Verify(VerifyArgs),
    /// Convert statistics files
    Statistics(StatisticsArgs),
    /// Write one self-contained HTML page of what a merge did
    ///
    /// Reads DIR/merge_report.json, writes DIR/report.html and prints its path. The page needs no network and
    /// opens from a file. For the directory of a sweep it lists the runs and writes a page for each of them.
    Report(ReportArgs),
    /// Print a completion script for a shell
    ///
    /// For example: mats-stream completions bash > /usr/share/bash-completion/completions/mats-stream
    Completions(CompletionsArgs),
    /// Print the man page, or write one page per command into a directory
    ///
    /// Without DIR the page of mats-stream itself goes to stdout. With DIR, which is made if need be, the whole
    /// set is written as packagers expect it: mats-stream.1, mats-stream-merge.1 and so on, each replacing a
    /// page that is there.
    Man(ManArgs),
}

/// `merge CONFIG --out DIR`.
#[derive(Debug, Clone, Args)]
pub struct MergeArgs {
    /// The config (mergekit's YAML)
    #[arg(value_name = "CONFIG")]
    pub config: PathBuf,

    // `Some` unless `dry_run`.
    /// Directory to write; must not exist, be empty, or hold this very merge to --resume
    #[arg(long, short, value_name = "DIR", required_unless_present = "dry_run")]
    pub out: Option<PathBuf>,

    #[command(flatten)]
    pub resources: ResourceArgs,

    /// Seed of whatever is random
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// What a NaN or Inf in an input does
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Nonfinite::Error)]
    pub nonfinite: Nonfinite,

    /// Continue a merge that ended early in the output directory; the result is the same, bit for bit
    #[arg(long)]
    pub resume: bool,

    /// Exit with 3 if some block did not converge (the output is kept)
    #[arg(long)]
    pub require_convergence: bool,

    /// Print the plan and stop, as `plan` does
    #[arg(long)]
    pub dry_run: bool,

    /// How progress is shown on stderr
    #[arg(long, value_enum, value_name = "HOW", default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
}

/// `plan CONFIG`.
#[derive(Debug, Clone, Args)]
pub struct PlanArgs {
    /// The config (mergekit's YAML)
    #[arg(value_name = "CONFIG")]
    pub config: PathBuf,

    #[command(flatten)]
    pub resources: ResourceArgs,

    /// Print strict JSON
    #[arg(long)]
    pub json: bool,
}

/// `inspect PATH`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// A model directory or a safetensors file
    #[arg(value_name = "PATH")]
    pub path: PathBuf,

    /// Print strict JSON
    #[arg(long)]
    pub json: bool,

    /// Read the data too: norms, NaN and Inf counts, spectra of Grams
    #[arg(long)]
    pub stats: bool,

    /// Memory that a spectrum may take, as 8GiB [default: 80 % of what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "stats")]
    pub max_memory: Option<u64>,
}

/// `diff A B`.
#[derive(Debug, Clone, Args)]
pub struct DiffArgs {
    /// A model directory or a safetensors file
    #[arg(value_name = "A")]
    pub a: PathBuf,

    /// What to compare it with
    #[arg(value_name = "B")]
    pub b: PathBuf,

    /// Largest difference that is none; more exits with 1
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = parse_tolerance)]
    pub tolerance: f64,

    /// Print strict JSON
    #[arg(long)]
    pub json: bool,
}

/// `materialise DIR TASK --out DIR2`.
#[derive(Debug, Clone, Args)]
pub struct MaterialiseArgs {
    /// Output directory of a finished merge with masks
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,

    /// The model to make: its number from 0, or its name in the config
    #[arg(value_name = "TASK")]
    pub task: String,

    /// Directory to write; must not exist, be empty, or hold this very run to --resume
    #[arg(long, short, value_name = "DIR")]
    pub out: PathBuf,

    /// Where the merge's base model is now, as PATH or PATH+ADAPTER
    #[arg(long, value_name = "PATH")]
    pub base: Option<String>,

    /// Hard bound on memory, page cache aside, as 8GiB [default: 80 % of what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,

    /// Threads to compute with; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = parse_threads)]
    pub threads: usize,

    /// Largest file of the output, in bytes
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    pub out_shard_size: u64,

    /// How inputs are read
    #[arg(long, value_enum, value_name = "HOW", default_value_t = IoMode::Mmap)]
    pub io: IoMode,

    /// What a NaN or Inf in an input does
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Nonfinite::Error)]
    pub nonfinite: Nonfinite,

    /// Continue a run that ended early in the output directory; the result is the same, bit for bit
    #[arg(long)]
    pub resume: bool,

    /// How progress is shown on stderr
    #[arg(long, value_enum, value_name = "HOW", default_value_t = ProgressMode::Auto)]
    pub progress: ProgressMode,
}

/// `verify DIR`.
#[derive(Debug, Clone, Args)]
pub struct VerifyArgs {
    /// Output directory of a finished merge
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,

    /// Check too that the inputs are what was merged: size, time, header
    #[arg(long)]
    pub inputs: bool,

    /// Print strict JSON
    #[arg(long)]
    pub json: bool,
}

/// `statistics COMMAND`.
#[derive(Debug, Clone, Args)]
pub struct StatisticsArgs {
    #[command(subcommand)]
    pub command: StatisticsCommand,
}

/// What to do with statistics.
#[derive(Debug, Clone, Subcommand)]
pub enum StatisticsCommand {
    /// Write statistics of another tool, or in another form, as one statistics file
    ///
    /// Reads this program's own files, the .pt files of r-three/mats (as data: nothing in them is run) and
    /// pmetal-merge's fisher.safetensors and regmean_grams.safetensors. All inputs are of one model.
    Convert(ConvertArgs),
}

/// `statistics convert IN… --out FILE`.
#[derive(Debug, Clone, Args)]
pub struct ConvertArgs {
    /// Statistics files of one model
    #[arg(value_name = "IN", required = true)]
    pub inputs: Vec<PathBuf>,

    /// File to write; must not exist
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,

    /// Whose files the inputs are
    #[arg(long, value_enum, value_name = "TOOL", default_value_t = SourceFormat::Auto)]
    pub from: SourceFormat,

    /// What a file holds whose name is not the one that its tool gives it
    #[arg(long, value_enum, value_name = "KIND")]
    pub kind: Option<ForeignKind>,

    /// Whether another tool's values are divided by their number [default: pmetal sums, others means]
    #[arg(long, value_enum, value_name = "WHAT")]
    pub values: Option<StoredValues>,

    /// Tokens that another tool's Grams are sums over; kept in the metadata
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub tokens: Option<u64>,

    /// Examples that another tool's Fishers are sums over; kept in the metadata
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub examples: Option<u64>,

    /// Replace the beginning of parameters' names, as transformer.= ; may be given several times
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_rename)]
    pub rename: Vec<(String, String)>,

    /// Store lower triangles of Grams [default for files of other tools]
    #[arg(long, conflicts_with = "dense")]
    pub packed: bool,

    /// Store whole Grams
    #[arg(long)]
    pub dense: bool,

    /// Store values so [default: as they are]
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub dtype: Option<StoredDtype>,

    /// Store Grams by their N leading directions, with bounds of the error in the metadata
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rank: Option<u32>,

    /// Hard bound on memory, page cache aside, as 8GiB [default: 80 % of what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,

    /// How inputs are read [default: pread on network file systems, else mmap]
    #[arg(long, value_enum, value_name = "HOW")]
    pub io: Option<IoMode>,
}

/// `report DIR`.
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// Output directory of a finished merge or sweep
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// `completions SHELL`.
#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// The shell that will read them
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

/// `man [DIR]`.
#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// Directory for one page per command
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

/// What `merge` and `plan` share: everything that decides how a merge is carried out.
#[derive(Debug, Clone, Args)]
pub struct ResourceArgs {
    /// Hard bound on memory, page cache aside, as 8GiB [default: 80 % of what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,

    /// Threads to compute with; 0 = all
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = parse_threads)]
    pub threads: usize,

    /// Largest file of the output, in bytes
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    pub out_shard_size: u64,

    /// How inputs are read
    #[arg(long, value_enum, value_name = "HOW", default_value_t = IoMode::Mmap)]
    pub io: IoMode,

    /// Accept tensors that are tied in one model and not in another
    #[arg(long)]
    pub untie: bool,
}

// Variants carry no doc comments: clap would print each on lines of its own and triple the length of
// `--help`.

/// `--io`: memory-mapped, or read into own buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IoMode {
    Mmap,
    Pread,
}

/// `--from`: the tool that wrote statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SourceFormat {
    Auto,
    Reference,
    Pmetal,
    MatsStream,
}

/// `--kind`: as keys spell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum ForeignKind {
    InputGram,
    OutputGram,
    FisherDiagonal,
    FisherBlock,
}

/// `--values`: divided by the number of tokens or examples, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StoredValues {
    Means,
    Sums,
}

/// `--dtype` of statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StoredDtype {
    F32,
    Bf16,
    F16,
}

/// `--nonfinite`: stop and name the tensor, or carry the value into the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Nonfinite {
    Error,
    Propagate,
}

/// `--progress`: a line redrawn on a terminal and plain elsewhere, one line per block, or nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressMode {
    Auto,
    Plain,
    None,
}

/// `--log-level`: what goes to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
}

/// Why a text is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SizeError {
    /// No digits, or something between them.
    #[error("not a size; write bytes or a unit, as 1048576, 512MiB, 1.5GiB or 5GB")]
    NotANumber,
    /// A minus sign.
    #[error("a size cannot be negative")]
    Negative,
    /// 0, or a fraction of a byte.
    #[error("a size must be at least one byte")]
    Zero,
    /// More than 2⁶⁴ − 1 bytes.
    #[error("more bytes than 64 bits can count")]
    Overflow,
    /// Letters that are no unit.
    #[error("unknown unit `{unit}` (expected kB, MB, GB, TB, KiB, MiB, GiB or TiB, or none for bytes)")]
    UnknownUnit { unit: String },
}

/// Bytes of a size as typed: an integer or a decimal fraction, then a unit or none. kB, MB, … are powers of
/// 1000; KiB, MiB, … of 1024; case does not matter. `B` alone is refused: mergekit means a billion by it.
///
/// # Errors
/// Anything else, 0 and less, and what 64 bits cannot hold.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err(SizeError::Negative);
    }
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = match number.split_once('.') {
        Some((_, "")) => return Err(SizeError::NotANumber),
        Some(parts) => parts,
        None => (number, ""),
    };
    if whole.is_empty() || fraction.contains('.') {
        return Err(SizeError::NotANumber);
    }
    let unit = unit.trim_start();
    let factor: u128 = match unit.to_ascii_lowercase().as_str() {
        "" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ if unit.starts_with(|c: char| c.is_ascii_alphabetic()) => {
            return Err(SizeError::UnknownUnit { unit: unit.chars().take(16).collect() });
        }
        _ => return Err(SizeError::NotANumber),
    };
    let whole: u128 = whole.parse().map_err(|_| SizeError::Overflow)?;
    // Exact: 1.1GB is 1100000000 bytes, which a float would miss. Digits past the 18th are less than a byte.
    let fraction = &fraction[..fraction.len().min(18)];
    let numerator: u128 =
        if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| SizeError::NotANumber)? };
    let part = numerator * factor / 10_u128.pow(fraction.len() as u32);
    let bytes =
        whole.checked_mul(factor).and_then(|bytes| bytes.checked_add(part)).ok_or(SizeError::Overflow)?;
    match u64::try_from(bytes) {
        Ok(0) => Err(SizeError::Zero),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err(SizeError::Overflow),
    }
}

/// `OLD=NEW`, split at its first `=`; OLD must have a character.
fn parse_rename(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("expected OLD=NEW, with the beginning of a name for OLD".to_owned()),
    }
}

fn parse_threads(text: &str) -> Result<usize, String> {
    const MOST: usize = 4096;
    match text.parse() {
        Ok(threads) if threads <= MOST => Ok(threads),
        _ => Err(format!("expected an integer from 0 to {MOST}")),
    }
}

fn parse_tolerance(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(tolerance) if tolerance.is_finite() && tolerance >= 0.0 => Ok(tolerance),
        _ => Err("expected a finite number of at least 0".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::*;

    fn parse(args: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("mats-stream").chain(args.split_whitespace()))
    }

    #[test]
    fn clap_finds_no_contradiction() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("1", 1),
            ("1048576", 1 << 20),
            ("512MiB", 512 << 20),
            ("8GiB", 8 << 30),
            ("1.5GiB", 3 << 29),
            ("0.5KiB", 512),
            ("5GB", 5_000_000_000),
            ("1.1GB", 1_100_000_000),
            ("2kB", 2_000),
            ("2KB", 2_000),
            ("3mb", 3_000_000),
            ("3KiB", 3 << 10),
            ("2TiB", 2 << 40),
            ("2TB", 2_000_000_000_000),
            (" 8 GiB ", 8 << 30),
            ("1.0000000000000000000000000000000000000001kB", 1_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        let unknown = |unit: &str| SizeError::UnknownUnit { unit: unit.to_owned() };
        for (text, error) in [
            ("", SizeError::NotANumber),
            ("GiB", SizeError::NotANumber),
            (".5GiB", SizeError::NotANumber),
            ("1.GiB", SizeError::NotANumber),
            ("1.2.3GiB", SizeError::NotANumber),
            ("1,5GiB", SizeError::NotANumber),
            ("1_000", SizeError::NotANumber),
            ("+1", SizeError::NotANumber),
            ("80%", SizeError::NotANumber),
            ("5B", unknown("B")),
            ("5G", unknown("G")),
            ("5gigs", unknown("gigs")),
            ("1e9", unknown("e9")),
            ("5GiBMiB", unknown("GiBMiB")),
            ("0", SizeError::Zero),
            ("0GiB", SizeError::Zero),
            ("0.4", SizeError::Zero),
            ("-1", SizeError::Negative),
            ("-8GiB", SizeError::Negative),
            ("18446744073709551616", SizeError::Overflow),
            ("16777216TiB", SizeError::Overflow),
            ("340282366920938463463374607431768211456", SizeError::Overflow),
            ("340282366920938463463374607431768211455TiB", SizeError::Overflow),
        ] {
            assert_eq!(parse_size(text), Err(error), "{text}");
        }
    }

    #[test]
    fn merge_defaults_and_flags() {
        let Command::Merge(args) = parse("merge c.yml --out d").expect("valid").command else {
            unreachable!("merge was typed")
        };
        assert_eq!((args.config, args.out), (PathBuf::from("c.yml"), Some(PathBuf::from("d"))));
        assert_eq!((args.resources.max_memory, args.resources.threads), (None, 0));
        assert_eq!((args.resources.out_shard_size, args.resources.io), (5_000_000_000, IoMode::Mmap));
        assert_eq!((args.seed, args.nonfinite, args.progress), (0, Nonfinite::Error, ProgressMode::Auto));
        assert!(!args.require_convergence && !args.resources.untie && !args.dry_run);

        let all = "merge c.yml --out d --max-memory 8GiB --threads 3 --out-shard-size 1MB --io pread \
                   --seed 7 --nonfinite propagate --require-convergence --untie --dry-run \
                   --progress none --log-level debug";
        let cli = parse(all).expect("valid");
        assert_eq!(cli.log_level, LogLevel::Debug);
        let Command::Merge(args) = cli.command else { unreachable!("merge was typed") };
        assert_eq!((args.resources.max_memory, args.resources.threads), (Some(8 << 30), 3));
        assert_eq!((args.resources.out_shard_size, args.resources.io), (1_000_000, IoMode::Pread));
        assert_eq!((args.seed, args.nonfinite, args.progress), (7, Nonfinite::Propagate, ProgressMode::None));
        assert!(args.require_convergence && args.resources.untie && args.dry_run);
    }

    #[test]
    fn other_commands() {
        for args in [
            "plan c.yml --json --max-memory 1GiB --threads 1 --io pread --out-shard-size 1GB --untie",
            "inspect m --json --stats",
            "diff a b --tolerance 1e-6 --json",
            "verify merged --inputs --json",
            "merge c.yml --out o --resume",
            "--log-level error diff a b",
            "merge c.yml --dry-run",
            "report merged",
            "statistics convert a.pt b.pt --out o --rename transformer.= --dtype bf16 --rank 8 --kind input_gram",
            "statistics convert a --out o --values sums --tokens 5 --examples 6 --dense --from pmetal --io pread",
            "inspect s --stats --max-memory 1GiB",
            "completions zsh",
            "man",
            "man pages",
        ] {
            assert!(parse(args).is_ok(), "{args}");
        }
    }

    #[test]
    fn usage_errors_exit_with_2() {
        for args in [
            "merge c.yml",
            "merge --out d",
            "merge c.yml --out d --max-memory 0",
            "merge c.yml --out d --max-memory=-1",
            "merge c.yml --out d --out-shard-size 5B",
            "merge c.yml --out d --threads 1000000",
            "merge c.yml --out d --threads=-1",
            "merge c.yml --out d --io direct",
            "merge c.yml --out d --seed x",
            "diff a b --tolerance nan",
            "diff a b --tolerance=-1",
            "diff a",
            "verify",
            "report",
            "report a b",
            "statistics",
            "statistics convert --out o",
            "statistics convert a",
            "statistics convert a --out o --rank 0",
            "statistics convert a --out o --packed --dense",
            "statistics convert a --out o --rename x",
            "statistics convert a --out o --rename =x",
            "statistics convert a --out o --tokens 0",
            "inspect s --max-memory 1GiB",
            "completions",
            "completions csh",
            "man a b",
            "frobnicate",
        ] {
            let error = parse(args).expect_err(args);
            assert_eq!(error.exit_code(), 2, "{args}");
        }
        for args in ["--help", "--version", "merge --help"] {
            assert_eq!(parse(args).expect_err(args).exit_code(), 0, "{args}");
        }
    }
}
