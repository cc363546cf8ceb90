package gemma.demo

import android.app.AlertDialog
import android.content.Context
import android.text.InputType
import android.view.View
import android.widget.CheckBox
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import gemma.core.ChatSettings
import gemma.core.GemmaException
import gemma.core.Manifest
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
        hint = "System prompt"
        setText(settings.system)
        maxLines = 6
    }
    private val temperature = number("Temperature", usual?.temperature, settings.sampling?.temperature)
    private val topK = number("Top k", usual?.topK, settings.sampling?.topK)
    private val topP = number("Top p", usual?.topP, settings.sampling?.topP)
    private val seed = count("Seed, for the same answer each time", settings.seed)
    private val thinking = check("Think before answering", settings.thinking, abilities.thinking)
    private val roll = check("When the context is full: forget the oldest turns", settings.roll)
    private val drafts = check("Guess repeated passages, and check them together", settings.drafts, abilities.drafts)
    private val threadCount = count("Threads, 1 to $cores, for the next loading (${usualThreads(cores)})", threads)

    /** A dialog that gives the settings and the threads to `onDone`. Values out of range are refused and change nothing. */
    fun builder(onDone: (ChatSettings, Int?) -> Unit): AlertDialog.Builder {
        val page = LinearLayout(context).apply { orientation = LinearLayout.VERTICAL }
        listOf<View>(system, temperature, topK, topP, seed, thinking, roll, drafts, threadCount).forEach(page::addView)
        return AlertDialog.Builder(context).setTitle("Settings").setView(ScrollView(context).apply { addView(page) })
            .setNegativeButton("Cancel", null)
            .setPositiveButton("Use") { _, _ ->
                try {
                    onDone(read(), parseThreads(threadCount.text.toString(), cores))
                } catch (error: GemmaException) {
                    AlertDialog.Builder(context).setMessage(error.message).setPositiveButton("Close", null).show()
                }
            }
    }

    private fun read(): ChatSettings {
        val texts = listOf(temperature, topK, topP).map { it.text.toString() }
        val base = usual ?: ChatSettings.RECOMMENDED
        val own = ChatSettings.parseSampling(texts[0], texts[1], texts[2], base)
        return ChatSettings(
            system = system.text.toString(),
            sampling = own.takeIf { texts.any(String::isNotBlank) },
            thinking = thinking.isChecked,
            roll = roll.isChecked,
            drafts = drafts.isChecked,
            seed = ChatSettings.parseSeed(seed.text.toString()),
        )
    }

    private fun number(name: String, usual: Number?, value: Number?) = EditText(context).apply {
        hint = if (usual == null) name else "$name ($usual)"
        inputType = InputType.TYPE_CLASS_NUMBER or InputType.TYPE_NUMBER_FLAG_DECIMAL
        value?.let { setText(it.toString()) }
    }

    private fun count(name: String, value: Int?) = EditText(context).apply {
        hint = name
        inputType = InputType.TYPE_CLASS_NUMBER
        value?.let { setText(it.toString()) }
    }

    private fun check(name: String, value: Boolean, isPossible: Boolean = true) = CheckBox(context).apply {
        text = name
        isEnabled = isPossible
        isChecked = value && isPossible
    }
}
