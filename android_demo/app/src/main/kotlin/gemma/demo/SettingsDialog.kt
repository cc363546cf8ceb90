package gemma.demo

import android.app.AlertDialog
import android.content.Context
import android.text.InputType
import android.widget.CheckBox
import android.widget.EditText
import gemma.core.ChatSettings
import gemma.core.Manifest
import gemma.core.SamplingDraft
import gemma.core.parseThreads
import gemma.core.usualThreads

/** What the loaded bundle can do; without one, all that any can. */
internal class Abilities(val thinking: Boolean = true, val drafts: Boolean = true)

/** The settings of a chat, and the number of threads for all chats. */
internal class SettingsDialog(
    private val context: Context,
    private val settings: ChatSettings,
    private val manifest: Manifest?, // of the loaded bundle, whose sampling the hints show
    abilities: Abilities,
    threads: Int?, // as chosen; null for the usual number
    private val cores: Int,
) {
    private val usual = manifest?.let { ChatSettings().samplingFor(it) }
    private val system = EditText(context).apply {
        setText(settings.system)
        maxLines = 6
    }
    private val temperature = number(usual?.temperature, settings.sampling?.temperature)
    private val topK = number(usual?.topK, settings.sampling?.topK)
    private val topP = number(usual?.topP, settings.sampling?.topP)
    private val minP = number(usual?.minP, settings.sampling?.minP)
    private val penalty = number(usual?.repetitionPenalty, settings.sampling?.repetitionPenalty)
    private val seed = count(null, settings.seed)
    private val thinking = check("Think before answering", settings.thinking, abilities.thinking)
    private val roll = check("When the context is full: forget the oldest turns", settings.roll)
    private val drafts = check("Guess repeated passages, and check them together", settings.drafts, abilities.drafts)
    private val threadCount = count(usualThreads(cores), threads)

    /** A dialog that gives the settings and the threads to `onDone`. While a value is out of range, it stays open and says so. */
    fun create(onDone: (ChatSettings, Int?) -> Unit): AlertDialog {
        val page = form(
            context,
            labelled("System prompt", system),
            labelled("Temperature", temperature),
            labelled("Top k", topK),
            labelled("Top p", topP),
            labelled("Min p", minP),
            labelled("Repetition penalty", penalty),
            labelled("Seed, for the same answer each time", seed),
            thinking,
            roll,
            drafts,
            labelled("Threads, 1 to $cores, for the next loading", threadCount),
        )
        return checkedDialog(AlertDialog.Builder(context).setTitle("Settings").setNegativeButton("Cancel", null), page, "Use") {
            onDone(read(), parseThreads(threadCount.text.toString(), cores))
        }
    }

    private fun read(): ChatSettings {
        fun text(field: EditText) = field.text.toString()
        val draft = SamplingDraft(text(temperature), text(topK), text(topP), text(minP), text(penalty))
        return settings.copy(
            system = text(system),
            sampling = draft.sampling(usual ?: ChatSettings.RECOMMENDED),
            thinking = thinking.isChecked,
            roll = roll.isChecked,
            drafts = drafts.isChecked,
            seed = ChatSettings.parseSeed(text(seed)),
        )
    }

    private fun number(usual: Number?, value: Number?) = count(usual, value).apply {
        inputType = InputType.TYPE_CLASS_NUMBER or InputType.TYPE_NUMBER_FLAG_DECIMAL
    }

    /** A field for a whole number; while it is blank it shows the usual one. */
    private fun count(usual: Number?, value: Number?) = EditText(context).apply {
        hint = usual?.toString()
        inputType = InputType.TYPE_CLASS_NUMBER
        value?.let { setText(it.toString()) }
    }

    private fun check(name: String, value: Boolean, isPossible: Boolean = true) = CheckBox(context).apply {
        text = name
        isEnabled = isPossible
        isChecked = value && isPossible
    }
}
